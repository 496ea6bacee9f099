//! Which span a request continues, by the metadata of its frame: the W3C trace context. Owns what
//! of that is believed: it comes from outside, is bounded, and is ignored if it is malformed. The
//! key `baggage` is never read: nothing is asked of others in whose requests it could travel.

use std::collections::HashMap;

use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{SpanContext, TraceContextExt};
use opentelemetry_sdk::propagation::TraceContextPropagator;

const PARENT: &str = "traceparent";
const STATE: &str = "tracestate";
/// `00-`, 32 digits, `-`, 16 digits, `-`, 2 digits: all of version 0.
const PARENT_LENGTH: usize = 55;
/// A later version may be longer. None is, by now.
const MAX_PARENT: usize = 128;
/// What every system has to pass on (W3C, 3.3.1.5). Each span has a copy.
const MAX_STATE: usize = 512;

/// The span of the caller, if it names one.
pub(super) fn of(metadata: &HashMap<String, String>) -> Option<SpanContext> {
    let parent = metadata.get(PARENT)?;
    if !is_well_formed(parent) {
        return None;
    }
    let state = metadata.get(STATE).filter(|state| state.len() <= MAX_STATE);
    let pair = Pair {
        parent,
        state: state.map(String::as_str),
    };
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &pair);
    let parent = context.span().span_context().clone();
    parent.is_valid().then_some(parent)
}

/// The two that are looked at.
struct Pair<'a> {
    parent: &'a str,
    state: Option<&'a str>,
}

impl Extractor for Pair<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            PARENT => Some(self.parent),
            STATE => self.state,
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec![PARENT, STATE]
    }
}

/// Whether each field has its length. The propagator takes shorter numbers, and signs before them.
fn is_well_formed(parent: &str) -> bool {
    let bytes = parent.as_bytes();
    if bytes.len() > MAX_PARENT {
        return false;
    }
    let Some((known, rest)) = bytes.split_at_checked(PARENT_LENGTH) else {
        return false;
    };
    let has_fields = known.iter().zip(0..).all(|(byte, at)| match at {
        2 | 35 | 52 => *byte == b'-',
        _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
    });
    let is_first_version = known.starts_with(b"00");
    let is_rest_valid = match rest.first() {
        None => true,
        Some(first) => !is_first_version && *first == b'-',
    };
    has_fields && is_rest_valid
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const VALID: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn with(pairs: &[(&str, &str)]) -> Option<SpanContext> {
        let pairs = pairs.iter();
        let metadata = pairs.map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        of(&metadata.collect())
    }

    #[test]
    fn the_span_of_the_caller_is_continued() {
        let parent = with(&[(PARENT, VALID), (STATE, "a=1,b=2")]).unwrap();
        assert_eq!(parent.trace_id().to_string(), TRACE);
        assert_eq!(parent.span_id().to_string(), "b7ad6b7169203331");
        assert!(parent.is_sampled() && parent.is_remote());
        assert_eq!(parent.trace_state().header(), "a=1,b=2");
        let unsampled = VALID.replace("-01", "-00");
        assert!(!with(&[(PARENT, &unsampled)]).unwrap().is_sampled());
        // Of a later version, with more behind it.
        let later = format!("{}-more", VALID.replacen("00", "cc", 1));
        assert!(with(&[(PARENT, &later)]).is_some());
    }

    #[test]
    fn a_malformed_parent_is_ignored() {
        let zero_trace = VALID.replace(TRACE, &"0".repeat(32));
        let zero_span = VALID.replace("b7ad6b7169203331", &"0".repeat(16));
        let hostile = [
            String::new(),
            "-".repeat(PARENT_LENGTH),
            "00-1-1-01".into(),
            VALID.to_uppercase(),
            VALID.replacen("00", "ff", 1),
            VALID.replacen("0a", "+a", 1),
            format!(" {VALID}"),
            format!("{VALID}-more"),
            format!("{}\n", VALID.replacen("00", "cc", 1)),
            format!(
                "{}-{}",
                VALID.replacen("00", "cc", 1),
                "x".repeat(MAX_PARENT)
            ),
            VALID.chars().take(54).collect(),
            // As long in bytes, and cut within a character.
            VALID.replacen("0a", "ä", 1),
            format!("{}ä", VALID.chars().take(54).collect::<String>()),
            "x".repeat(4 << 20),
            zero_trace,
            zero_span,
        ];
        for parent in hostile {
            let shown: String = parent.chars().take(80).collect();
            assert_eq!(with(&[(PARENT, &parent)]), None, "{shown}");
        }
        assert_eq!(with(&[]), None);
        assert_eq!(with(&[(STATE, "a=1")]), None);
    }

    #[test]
    fn a_malformed_or_long_state_is_dropped_and_the_parent_is_not() {
        let long = format!("a={}", "x".repeat(MAX_STATE));
        for state in [long.as_str(), "no pair", "=", "A=1", "ä=1", "a=\0"] {
            let parent = with(&[(PARENT, VALID), (STATE, state)]).unwrap();
            assert_eq!(parent.trace_id().to_string(), TRACE);
            assert!(parent.trace_state().header().len() <= MAX_STATE);
        }
        let parent = with(&[(PARENT, VALID), (STATE, &long)]).unwrap();
        assert_eq!(parent.trace_state().header(), "");
    }
}

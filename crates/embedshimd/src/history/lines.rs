//! [`Lines`]: events as text, one behind the other in one piece of memory. Owns how they are kept;
//! knows no bound.
//!
//! An event of its own memory lies where there was room for it: among what a container takes. When
//! 500 containers are gone, the last 1,000 events would hold a page each of what they had.

use std::collections::VecDeque;

use crate::admin::documents::Event;

/// Events, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Lines {
    text: VecDeque<u8>,
    lengths: VecDeque<usize>,
}

impl Lines {
    pub(super) fn len(&self) -> usize {
        self.lengths.len()
    }

    pub(super) fn push(&mut self, event: &Event) {
        // Numbers and strings: they are always text.
        let line = serde_json::to_vec(event).unwrap_or_default();
        self.lengths.push_back(line.len());
        self.text.extend(line);
    }

    /// Forgets the oldest.
    pub(super) fn pop(&mut self) {
        if let Some(length) = self.lengths.pop_front() {
            self.text.drain(..length);
        }
    }

    /// A copy of so many after the first `skipped`.
    pub(super) fn copy(&self, skipped: usize, count: usize) -> Copied {
        let before: usize = self.lengths.iter().take(skipped).sum();
        let lengths = self.lengths.iter().skip(skipped).take(count);
        let (count, length) = (lengths.len(), lengths.sum());
        let text = self.text.iter().skip(before).take(length);
        Copied {
            text: text.copied().collect(),
            count,
        }
    }
}

/// Some of them, to be read when no lock is held.
#[derive(Debug)]
pub(super) struct Copied {
    text: Vec<u8>,
    pub(super) count: usize,
}

impl Copied {
    pub(super) fn events(&self) -> Vec<Event> {
        let events = serde_json::Deserializer::from_slice(&self.text).into_iter();
        events.flatten().collect()
    }
}

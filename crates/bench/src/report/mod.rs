//! [`Report`]: what a run has found, as JSON keeps it; and [`Recorder`], which collects values
//! while a run measures. Measures nothing itself.

pub(crate) mod compare;
pub(crate) mod limits;
pub(crate) mod machine;
pub(crate) mod page;
pub(crate) mod plots;
pub(crate) mod table;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::statistics::{Summary, ratios};
use machine::Machine;

/// Changes when a reader of the old format would misread the new one.
pub(crate) const FORMAT: u32 = 1;
/// What others are compared with, where it was measured too.
pub(crate) const FLOOR: &str = "floor";
/// Our own subject.
pub(crate) const OURS: &str = "ours";

/// Everything of one run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) format: u32,
    pub(crate) machine: Machine,
    pub(crate) subjects: Vec<SubjectInfo>,
    pub(crate) figures: Vec<Figure>,
}

/// What was measured, or why it was not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SubjectInfo {
    pub(crate) name: String,
    pub(crate) what: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) skipped: Option<String>,
}

/// What a value is, and so which direction is worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Unit {
    Milliseconds,
    Nanoseconds,
    PerSecond,
    MebibytesPerSecond,
    Number,
    Kilobytes,
}

impl Unit {
    pub(crate) fn symbol(self) -> &'static str {
        match self {
            Self::Milliseconds => "ms",
            Self::Nanoseconds => "ns",
            Self::PerSecond => "/s",
            Self::MebibytesPerSecond => "MiB/s",
            Self::Number => "",
            Self::Kilobytes => "kB",
        }
    }

    pub(crate) fn is_more_better(self) -> bool {
        matches!(self, Self::PerSecond | Self::MebibytesPerSecond)
    }
}

/// One figure of one subject.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    /// With how many containers, lives at once, or mounts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) at: Option<u64>,
    pub(crate) subject: String,
    pub(crate) unit: Unit,
    pub(crate) samples: usize,
    pub(crate) median: f64,
    pub(crate) p95: f64,
    pub(crate) p99: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ratio: Option<Ratio>,
}

/// To another subject's value in the same round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ratio {
    pub(crate) to: String,
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Report {
    /// What another run has found, as far as this one has not.
    pub(crate) fn merge(mut self, other: Self) -> Self {
        for figure in other.figures {
            if self
                .find(&figure.name, figure.at, &figure.subject)
                .is_none()
            {
                self.figures.push(figure);
            }
        }
        for info in other.subjects {
            match self.subjects.iter_mut().find(|own| own.name == info.name) {
                Some(own) if own.skipped.is_some() => *own = info,
                Some(_) => {}
                None => self.subjects.push(info),
            }
        }
        self.machine.add(&other.machine);
        self
    }

    /// A figure.
    pub(crate) fn find(&self, name: &str, at: Option<u64>, subject: &str) -> Option<&Figure> {
        let is_it =
            |figure: &&Figure| figure.name == name && figure.at == at && figure.subject == subject;
        self.figures.iter().find(is_it)
    }
}

/// Name, number and subject, in the order in which they were first recorded.
type Key = (String, Option<u64>, String);

/// Values as they come.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    order: Vec<Key>,
    values: BTreeMap<Key, (Unit, Vec<f64>)>,
}

impl Recorder {
    /// One value of a figure that has no number.
    pub(crate) fn record(&mut self, name: &str, subject: &str, unit: Unit, value: f64) {
        self.record_at(name, None, subject, unit, value);
    }

    /// One value.
    pub(crate) fn record_at(
        &mut self,
        name: &str,
        at: Option<u64>,
        subject: &str,
        unit: Unit,
        value: f64,
    ) {
        let key = (name.to_owned(), at, subject.to_owned());
        if !self.values.contains_key(&key) {
            self.order.push(key.clone());
        }
        let (_, values) = self.values.entry(key).or_insert_with(|| (unit, Vec::new()));
        values.push(value);
    }

    /// The figures, with their ratios to the floor; where it was not measured, to the first of the
    /// others that is not ours.
    pub(crate) fn finish(self) -> Vec<Figure> {
        let figures = self.order.iter().filter_map(|key| {
            let (unit, values) = self.values.get(key)?;
            let (name, at, subject) = key;
            let summary = Summary::of(values)?;
            let baseline = self
                .baseline(name, *at)
                .filter(|baseline| baseline != subject);
            Some(Figure {
                name: name.clone(),
                at: *at,
                subject: subject.clone(),
                unit: *unit,
                samples: summary.samples,
                median: round(summary.median),
                p95: round(summary.p95),
                p99: round(summary.p99),
                low: round(summary.low),
                high: round(summary.high),
                ratio: baseline.and_then(|baseline| {
                    let base = (name.clone(), *at, baseline.to_owned());
                    ratio(values, &self.values.get(&base)?.1, baseline)
                }),
            })
        });
        figures.collect()
    }

    fn baseline(&self, name: &str, at: Option<u64>) -> Option<&str> {
        let same = self.order.iter().filter(|key| key.0 == name && key.1 == at);
        let subjects = same.map(|(_, _, subject)| subject.as_str());
        let mut others = subjects.filter(|subject| *subject != OURS).peekable();
        let first = others.peek().copied();
        others.find(|subject| *subject == FLOOR).or(first)
    }
}

fn ratio(values: &[f64], base: &[f64], baseline: &str) -> Option<Ratio> {
    let summary = Summary::of(&ratios(values, base))?;
    Some(Ratio {
        to: baseline.to_owned(),
        median: round(summary.median),
        low: round(summary.low),
        high: round(summary.high),
    })
}

/// To a ten-thousandth: what is beyond is noise, and makes the file hard to read.
fn round(value: f64) -> f64 {
    (value * 10_000.0).round() / 10_000.0
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A small report, for the tests of what reads one.
    pub(crate) fn example() -> Report {
        let mut recorder = Recorder::default();
        for round in 0..20_u32 {
            let noise = f64::from(round % 5);
            let milliseconds = Unit::Milliseconds;
            recorder.record("life", FLOOR, milliseconds, 75.0 + noise);
            recorder.record("life", OURS, milliseconds, 88.0 + noise);
            recorder.record("life", "go 1.6", milliseconds, 114.0 + noise);
            recorder.record("counts/calls/shim", OURS, Unit::Number, 990.0 + noise);
            for at in [1, 8] {
                let rate = 20.0 + noise;
                recorder.record_at("rate", Some(at), FLOOR, Unit::PerSecond, rate);
                recorder.record_at("rate", Some(at), OURS, Unit::PerSecond, rate - 2.0);
            }
        }
        let info = |name: &str, what: &str, skipped: Option<&str>| SubjectInfo {
            name: name.into(),
            what: what.into(),
            skipped: skipped.map(Into::into),
        };
        Report {
            format: FORMAT,
            machine: Machine::example(),
            subjects: vec![
                info(FLOOR, "runc 1.1.5", None),
                info(OURS, "embedshimd 0.1.0", None),
                info("go 1.6", "containerd-shim-runc-v2 1.6.20", None),
                info("crun", "crun", Some("it is not installed")),
            ],
            figures: recorder.finish(),
        }
    }

    #[test]
    fn ratios_are_to_the_same_round_of_the_floor() {
        let report = example();
        let ours = report.find("life", None, OURS).unwrap();
        let ratio = ours.ratio.as_ref().unwrap();
        assert!((1.16..1.18).contains(&ratio.median), "{ratio:?}");
        assert_eq!(report.find("life", None, FLOOR).unwrap().ratio, None);
        assert_eq!(
            report.find("counts/calls/shim", None, OURS).unwrap().ratio,
            None
        );
    }

    #[test]
    fn reports_are_merged_and_the_first_one_counts() {
        let (first, mut other) = (example(), example());
        for figure in &mut other.figures {
            figure.median += 1.0;
        }
        if let Some(figure) = other.figures.first_mut() {
            figure.name = "another".into();
        }
        let merged = first.clone().merge(other);
        assert_eq!(merged.figures.len(), first.figures.len() + 1);
        assert_eq!(
            merged.find("life", None, OURS),
            first.find("life", None, OURS)
        );
        assert_eq!(merged.machine.seconds, 2 * first.machine.seconds);
        assert_eq!(merged.subjects, first.subjects);
    }

    #[test]
    fn a_report_is_read_as_it_was_written() {
        let report = example();
        let text = serde_json::to_string(&report).unwrap();
        let read: Report = serde_json::from_str(&text).unwrap();
        assert_eq!(read, report);
    }
}

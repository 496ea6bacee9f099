//! What a run in CI may cost at most, from the checked-in `limits.toml`: counts and bytes, which
//! are the same on a busy machine; never times.

use std::collections::BTreeMap;

use anyhow::{Context, bail, ensure};
use serde::Deserialize;

use super::table::number;
use super::{OURS, Report, Unit};

/// The checked-in limits.
pub(crate) const CHECKED_IN: &str = include_str!("../../limits.toml");

/// Upper limits of our own figures, by name.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Limits {
    at_most: BTreeMap<String, f64>,
}

impl Limits {
    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        toml::from_str(text).context("limits.toml")
    }

    /// Prints each figure beside its limit, and fails if one is exceeded or was not measured.
    pub(crate) fn check(&self, report: &Report) -> anyhow::Result<()> {
        let mut exceeded = Vec::new();
        for (name, limit) in &self.at_most {
            let figure = report.figures.iter();
            let figure = figure.filter(|figure| figure.subject == OURS);
            let figure = figure.rev().find(|figure| figure.name == *name);
            let figure = figure.with_context(|| format!("{name} was not measured"))?;
            ensure!(
                matches!(figure.unit, Unit::Number | Unit::Kilobytes),
                "{name} is a time, which CI must not judge"
            );
            let is_exceeded = figure.median > *limit;
            let verdict = if is_exceeded { "EXCEEDED" } else { "ok" };
            println!(
                "{name}: {} of at most {} {}... {verdict}",
                number(figure.median),
                number(*limit),
                figure.unit.symbol(),
            );
            if is_exceeded {
                exceeded.push(name.as_str());
            }
        }
        if exceeded.is_empty() {
            return Ok(());
        }
        bail!(
            "beyond the limits of crates/bench/limits.toml: {}",
            exceeded.join(", ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::example;
    use super::*;

    fn verdict(text: &str) -> anyhow::Result<()> {
        Limits::parse(text)?.check(&example())
    }

    #[test]
    fn a_count_may_reach_its_limit_and_not_exceed_it() {
        assert!(verdict("[at_most]\n\"counts/calls/shim\" = 992").is_ok());
        assert!(verdict("[at_most]\n\"counts/calls/shim\" = 991").is_err());
    }

    #[test]
    fn times_and_what_was_not_measured_are_no_limits() {
        assert!(verdict("[at_most]\nlife = 1000").is_err());
        assert!(verdict("[at_most]\nabsent = 1000").is_err());
    }

    #[test]
    fn the_checked_in_limits_can_be_read() {
        assert!(!Limits::parse(CHECKED_IN).unwrap().at_most.is_empty());
    }
}

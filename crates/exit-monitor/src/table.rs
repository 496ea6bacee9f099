//! A [`Report`] for people. Owns the layout; every word about a feature is the backend's.

use std::fmt;

use crate::{Availability, Durability, Feature, FeatureState, Report};

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: Vec<_> = self.backends.iter().flat_map(rows).collect();
        let name = width(
            rows.iter().map(|(_, feature)| feature.name.as_str()),
            "FEATURE",
        );
        let since = width(
            rows.iter().map(|(_, feature)| feature.since.as_str()),
            "SINCE",
        );
        writeln!(
            f,
            "{:name$}  {:since$}  HERE  WHO     NEEDS IT",
            "FEATURE", "SINCE"
        )?;
        for (backend, feature) in &rows {
            let here = if feature.is_present() { "yes" } else { "no" };
            writeln!(
                f,
                "{:name$}  {:since$}  {here:4}  {:6}  {}",
                feature.name,
                feature.since,
                backend.backend.to_string(),
                feature.used_for
            )?;
            if let FeatureState::Missing { why, .. } = &feature.state {
                writeln!(f, "{:name$}  {:since$}        not here: {why}", "", "")?;
            }
        }
        writeln!(f, "\nRANKING")?;
        for (place, ranked) in (1..).zip(&self.ranking) {
            let mark = if ranked.is_chosen { ", chosen" } else { "" };
            writeln!(f, "{place}. {}{mark}: {}", ranked.backend, ranked.why)?;
        }
        if !self.remedies.is_empty() {
            writeln!(f, "\nFOR MORE")?;
        }
        for remedy in &self.remedies {
            writeln!(f, "- {remedy}")?;
        }
        writeln!(f, "\n{}", self.durability)
    }
}

fn rows(backend: &Availability) -> impl Iterator<Item = (&Availability, &Feature)> {
    backend
        .features
        .iter()
        .map(move |feature| (backend, feature))
}

fn width<'a>(cells: impl Iterator<Item = &'a str>, title: &str) -> usize {
    cells.map(str::len).max().unwrap_or(0).max(title.len())
}

impl fmt::Display for Durability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Always => "No exit is lost here, whatever is killed.",
            Self::WhileDaemonRuns => {
                "Exits are known here while the daemon lives; while it is down they can be lost."
            }
            Self::Unsupported => "No exit monitor that the configuration allows can run here.",
        })
    }
}

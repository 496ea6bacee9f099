//! [`Bench`]: what all parts of a run use: the subjects and their turns, names for containers, and
//! where values are recorded.

use std::path::Path;
use std::time::{Duration, Instant};

use testbed::bench::Options;

use crate::count::Counter;
use crate::report::{Recorder, Unit};
use crate::subject::{Chosen, Container, Ground, Subject};

/// What all parts use.
#[derive(Debug)]
pub(crate) struct Bench<'a> {
    pub(crate) options: &'a Options,
    pub(crate) ground: &'a Ground,
    pub(crate) binaries: &'a Path,
    pub(crate) chosen: &'a Chosen,
    /// None where the kernel does not let us count, which has been said.
    pub(crate) counter: Option<Counter>,
    pub(crate) recorder: Recorder,
    next_id: u64,
    /// When a quick run has spent enough on a part.
    limit: Option<Instant>,
}

impl<'a> Bench<'a> {
    pub(crate) fn new(
        options: &'a Options,
        ground: &'a Ground,
        binaries: &'a Path,
        chosen: &'a Chosen,
        counter: Option<Counter>,
    ) -> Self {
        Self {
            options,
            ground,
            binaries,
            chosen,
            counter,
            recorder: Recorder::default(),
            next_id: 0,
            limit: None,
        }
    }

    /// Lets a quick run spend so much on a part.
    pub(super) fn limit(&mut self, limit: Option<Instant>) {
        self.limit = limit;
    }

    /// How often, unless the options say it.
    pub(super) fn rounds(&self, full: u32, quick: u32) -> u32 {
        self.options
            .rounds
            .unwrap_or(if self.is_short() { quick } else { full })
    }

    /// Whether enough time was spent on a part, after the least number of rounds.
    pub(super) fn is_late(&self, round: u32, least: u32) -> bool {
        round >= least && self.limit.is_some_and(|limit| Instant::now() >= limit)
    }

    pub(super) fn is_short(&self) -> bool {
        self.options.quick || self.options.counts_only
    }

    /// A name that no other container has.
    pub(super) fn id(&mut self) -> String {
        self.next_id += 1;
        format!("b{}", self.next_id)
    }

    /// The subjects in the order of a round: there and back again, so that none always follows the
    /// same other one.
    pub(super) fn in_turn(&self, round: u32) -> Vec<&'a Subject> {
        let mut subjects: Vec<&Subject> = self.chosen.subjects.iter().collect();
        if round % 2 == 1 {
            subjects.reverse();
        }
        subjects
    }

    /// A container that runs.
    pub(super) fn running(&mut self, subject: &Subject) -> anyhow::Result<Container> {
        let id = self.id();
        let bundle = self.ground.bundle(&id)?;
        let mut container = subject.launch(self.ground, &id, bundle)?;
        container.create()?;
        container.start()?;
        Ok(container)
    }

    pub(super) fn time(&mut self, name: &str, at: Option<u64>, subject: &str, took: Duration) {
        let milliseconds = took.as_secs_f64() * 1000.0;
        self.recorder
            .record_at(name, at, subject, Unit::Milliseconds, milliseconds);
    }
}

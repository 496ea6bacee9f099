//! Exits that nobody has acted on: [`Unheeded`] knows them, [`Rounds`] says when to tell of them again. Never sends.
//!
//! containerd acknowledges an event when it has it, whether or not its clients listen again after its restart: docker does some
//! moments later, and would believe for ever that such a container runs (containerd.md 5). A task that is stopped and not
//! deleted is the sign of it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use embedshim_core::event::{Event, EventKind};
use embedshim_core::id::TaskKey;

use super::outbox::Outbox;

/// How long after a connection was made the exits from before are told again.
const AFTER: [Duration; 3] = [
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(15),
];
/// Of so many tasks the exits are remembered.
const CAPACITY: usize = 10_000;

/// The exits of all tasks that are stopped and not deleted.
#[derive(Debug, Default)]
pub(super) struct Unheeded(BTreeMap<TaskKey, (Instant, Arc<[u8]>)>);

impl Unheeded {
    /// Takes notice of an event.
    pub(super) fn accept(&mut self, event: &Event, envelope: &Arc<[u8]>) {
        let key = || TaskKey {
            namespace: event.namespace.clone(),
            id: event.id.clone(),
        };
        match &event.kind {
            EventKind::Exited { exec: None, .. } => {
                if self.0.len() < CAPACITY {
                    self.0.insert(key(), (Instant::now(), Arc::clone(envelope)));
                }
            }
            EventKind::Created { .. } | EventKind::Deleted { .. } => {
                self.0.remove(&key());
            }
            _ => {}
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those up to this moment.
    pub(super) fn at(&self, moment: Instant) -> VecDeque<TaskKey> {
        let before = self.0.iter().filter(|(_, (at, _))| *at <= moment);
        before.map(|(task, _)| task.clone()).collect()
    }

    pub(super) fn of(&self, task: &TaskKey) -> Option<Arc<[u8]>> {
        self.0.get(task).map(|(_, envelope)| Arc::clone(envelope))
    }
}

/// When which exits are told again.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    connected: Option<Instant>,
    /// How many of [`AFTER`] have begun.
    begun: usize,
    /// Of whom this round has still to tell.
    left: VecDeque<TaskKey>,
}

impl Rounds {
    /// A connection was made.
    pub(super) fn connected(&mut self) {
        *self = Self {
            connected: Some(Instant::now()),
            ..Self::default()
        };
    }

    /// The connection has lasted for longer than all rounds.
    pub(super) fn are_over(&self) -> bool {
        self.begun == AFTER.len()
    }

    /// When there is something to do next.
    pub(super) fn due(&self) -> Option<Instant> {
        let after = AFTER.get(self.begun)?;
        self.connected?.checked_add(*after)
    }

    /// The next exit to tell again, now.
    pub(super) fn next(&mut self, outbox: &Outbox) -> Option<Arc<[u8]>> {
        if let (Some(due), Some(connected)) = (self.due(), self.connected)
            && due <= Instant::now()
        {
            self.begun += 1;
            self.left = outbox.unheeded_at(connected);
        }
        // Who was deleted since the round began is not told of.
        while let Some(task) = self.left.pop_front() {
            if let Some(exit) = outbox.unheeded(&task) {
                return Some(exit);
            }
        }
        None
    }
}

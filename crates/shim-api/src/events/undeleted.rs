//! [`Unheeded`]: exits of which containerd knows and whose tasks it has not deleted. Never sends.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use embedshim_core::event::{Event, EventKind};
use embedshim_core::id::TaskKey;

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
            EventKind::Exited { exec: None, .. } if self.0.len() < CAPACITY => {
                self.0.insert(key(), (Instant::now(), Arc::clone(envelope)));
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

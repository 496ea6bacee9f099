//! [`UndeletedExits`]: the exits that containerd was sent and whose tasks it has not deleted. Never
//! sends.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use embedshim_core::event::{Event, EventKind};
use embedshim_core::id::TaskKey;

/// The exits of at most so many tasks are remembered.
const CAPACITY: usize = 10_000;

/// The exits of all tasks that are stopped and not deleted.
#[derive(Debug, Default)]
pub(super) struct UndeletedExits(BTreeMap<TaskKey, (Instant, Arc<[u8]>)>);

impl UndeletedExits {
    /// Adds an exit, or removes that of a task which is deleted or created again.
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

    /// The tasks whose exit was added up to this moment.
    pub(super) fn until(&self, moment: Instant) -> VecDeque<TaskKey> {
        let before = self.0.iter().filter(|(_, (at, _))| *at <= moment);
        before.map(|(task, _)| task.clone()).collect()
    }

    /// The exit of this task, if it is not deleted.
    pub(super) fn get(&self, task: &TaskKey) -> Option<Arc<[u8]>> {
        self.0.get(task).map(|(_, envelope)| Arc::clone(envelope))
    }
}

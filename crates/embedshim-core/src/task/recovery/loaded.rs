//! [`LoadedTask`]: what is on disk of a task. Owns what is looked at in its bundle.

use tracing::warn;

use crate::bundle::Bundle;
use crate::process::Process;
use crate::spec::{Spec, Traits};
use crate::task::record::TaskRecord;

/// What is on disk of a task.
pub(super) struct LoadedTask {
    pub(super) record: TaskRecord,
    pub(super) traits: Traits,
    /// containerd removed the bundle while no daemon was there to clean up with it, and nothing of
    /// the task lives.
    pub(super) is_bundle_gone: bool,
}

impl LoadedTask {
    /// Looks. Blocks on the file system.
    pub(super) fn of(record: TaskRecord) -> Self {
        let traits = record.traits.unwrap_or_else(|| of_bundle(&record));
        let is_there = Bundle::open(&record.bundle.path).is_ok_and(|found| found == record.bundle);
        let alive = |identity| {
            Process::reopen(identity).is_ok_and(|process| !process.has_ended().unwrap_or(false))
        };
        let is_bundle_gone = !is_there && !record.init.identity.is_some_and(alive);
        Self {
            record,
            traits,
            is_bundle_gone,
        }
    }
}

/// An older version has not recorded them.
fn of_bundle(record: &TaskRecord) -> Traits {
    match Spec::read(&record.bundle.path) {
        Ok(spec) => spec.traits(),
        Err(error) => {
            warn!(
                id = %record.id, %error,
                "cannot read the bundle: its container is treated as sharing a pid namespace"
            );
            Traits::default()
        }
    }
}

//! [`LoadedTask`]: what is on disk of a task. Owns what is looked at in its bundle.

use tracing::warn;

use crate::bundle::Bundle;
use crate::process::Process;
use crate::spec::Spec;
use crate::task::record::TaskRecord;

/// What is on disk of a task.
pub(super) struct LoadedTask {
    pub(super) record: TaskRecord,
    pub(super) spec: Spec,
    /// containerd removed the bundle while no daemon was there to clean up with it, and nothing of
    /// the task lives.
    pub(super) is_bundle_gone: bool,
}

impl LoadedTask {
    /// Looks. Blocks on the file system.
    pub(super) fn of(record: TaskRecord) -> Self {
        let spec = Spec::read(&record.bundle.path).unwrap_or_else(|error| {
            warn!(
                id = %record.id, %error,
                "cannot read the bundle: its container is treated as sharing a pid namespace"
            );
            Spec::default()
        });
        let is_there = Bundle::open(&record.bundle.path).is_ok_and(|found| found == record.bundle);
        let alive = |identity| {
            Process::reopen(identity).is_ok_and(|process| !process.has_ended().unwrap_or(false))
        };
        let is_bundle_gone = !is_there && !record.init.identity.is_some_and(alive);
        Self {
            record,
            spec,
            is_bundle_gone,
        }
    }
}

//! The removal of what a task leaves: container, mounts, record, logger. Owns that each step is
//! tried, whatever became of the others, and can be repeated; never decides that a task is to go.

use std::sync::Arc;

use tracing::warn;

use crate::blocking::blocking;
use crate::cgroup::Cgroup;
use crate::rootfs;
use crate::spec::Spec;
use crate::stdio;
use crate::task::engine::Engine;
use crate::task::process::TaskProcess;
use crate::task::task::Task;

impl Engine {
    /// Removes container, mounts and record of a task that is not to be. Idempotent.
    pub(in crate::task) async fn remove_traces(&self, task: &Arc<Task>, runtime_was_called: bool) {
        if runtime_was_called
            && let Err(error) = task.runtime.delete(task.id(), true, &task.log()).await
        {
            // The runtime is missing, say, which the client learns from its own error.
            warn!(id = %task.id(), %error, "cannot delete a container that was not created");
        }
        if runtime_was_called {
            remove_left_cgroup(task).await;
        }
        if !task.rootfs.is_empty() {
            let (target, bundle) = (task.rootfs_path(), task.bundle.path.clone());
            let unmount = move || {
                rootfs::end_left(&bundle);
                rootfs::unmount_recursive(&target)
            };
            match blocking(unmount).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => warn!(id = %task.id(), %error, "cannot unmount"),
                Err(error) => warn!(id = %task.id(), %error, "cannot unmount"),
            }
        }
        if let Err(error) = self.remove_record(task).await {
            warn!(id = %task.id(), %error, "cannot remove a task record");
        }
    }
}

/// Ends the process's logger, if it has one.
pub(in crate::task) async fn end_logger(process: &TaskProcess) {
    if let Some(logger) = process.take_logger() {
        stdio::end_logger(logger).await;
    }
}

/// Removes the cgroup of a container that the runtime has begun to make and does not know: it was
/// killed before it had noted it.
pub(in crate::task) async fn remove_left_cgroup(task: &Task) {
    let bundle = task.bundle.path.clone();
    let removed = blocking(move || match Spec::read(&bundle) {
        Ok(spec) => spec.cgroups_path().map_or(Ok(()), Cgroup::remove_left),
        // With its bundle goes what is known of it.
        Err(_) => Ok(()),
    });
    if let Ok(Err(error)) = removed.await {
        warn!(
            id = %task.id(), %error,
            "cannot remove the cgroup of a container that was not created"
        );
    }
}

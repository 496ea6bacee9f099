//! The start of a container that goes on from a checkpoint. Owns that a restore which fails, or is
//! cut short, leaves the task as it was before, and nothing on the machine.

use std::sync::Arc;

use tracing::warn;

use crate::blocking::blocking;
use crate::error::Error;
use crate::rootfs;
use crate::stdio::Plan;
use crate::task::engine::Engine;
use crate::task::launch::CRIU_WORK;
use crate::task::task::Task;
use crate::task::teardown::{end_logger, remove_left_cgroup};

impl Engine {
    /// Brings a container back from its checkpoint. On failure the task is what it was before.
    pub(in crate::task) async fn restore_container(
        self: &Arc<Self>,
        task: &Arc<Task>,
    ) -> Result<(), Error> {
        let plan = Plan::parse(&task.init.stdio)?;
        let restored = self.launch(task, &plan).await;
        if restored.is_err() {
            if let Some(identity) = task.init.identity() {
                // As long as it is tracked, the reaper leaves its zombie alone.
                self.unwatch(task, identity).await;
            }
            task.init.unmake();
            task.init.fds.remove_all();
            end_logger(&task.init).await;
            remove_half_restored(task).await;
        }
        restored
    }
}

/// A restore that was cut short with its daemon: what there is of it is not watched, and no client
/// knows of it.
pub(in crate::task) async fn undo_restore(task: &Arc<Task>) {
    let is_half_done = task.init.start_mark().is_some() && task.checkpoint.is_some();
    if !is_half_done {
        return;
    }
    remove_half_restored(task).await;
    task.init.unmark_start();
    task.init.unmake();
}

/// What is left of a container whose restore has failed. runc that was killed leaves the mount of
/// the root in its state directory, and cannot remove that directory then.
async fn remove_half_restored(task: &Task) {
    let mounts = [
        task.runtime.state_of(task.id()),
        task.bundle.path.join(CRIU_WORK),
    ];
    let unmounted =
        blocking(move || mounts.map(|directory| rootfs::unmount_recursive(&directory))).await;
    for failed in unmounted.into_iter().flatten().filter_map(Result::err) {
        warn!(id = %task.id(), error = %failed, "cannot unmount what was mounted for a restore");
    }
    if let Err(error) = task.runtime.delete(task.id(), true, &task.log()).await {
        warn!(id = %task.id(), %error, "cannot delete a container that was not restored");
    }
    remove_left_cgroup(task).await;
}

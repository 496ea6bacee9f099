//! `Checkpoint`: the container's state to files, by CRIU. Owns where CRIU works and what is left of
//! its log.

use std::sync::Arc;

use tracing::warn;

use crate::blocking::blocking;
use crate::error::Error;
use crate::id::TaskKey;
use crate::runtime::Checkpoint;
use crate::task::api::CheckpointTask;
use crate::task::cut_short::Known;
use crate::task::engine::Engine;
use crate::task::launch::CRIU_WORK;
use crate::task::lifecycle::{Operation, Phase};
use crate::task::task::Task;

/// What CRIU writes last of an image.
const INVENTORY: &str = "inventory.img";

impl Engine {
    /// Writes the container's state to files.
    pub(in crate::task) async fn checkpoint(
        self: Arc<Self>,
        key: TaskKey,
        request: CheckpointTask,
        is_replay: bool,
    ) -> Result<(), Error> {
        let task = self.registry.task(&key)?;
        let _mutation = task.init.lock_mutations().await?;
        if is_replay && request.exit && is_checkpointed(&task, &request).await? {
            // It ended because that was asked for.
            return Ok(());
        }
        if is_replay {
            // The daemon before has died between the failure and this.
            thaw_left(&task).await;
        }
        task.init.now().lifecycle.admit(Operation::Checkpoint)?;
        if !request.image.is_absolute() {
            let path = request.image.display();
            return Err(Error::Invalid(format!(
                "checkpoint {path} is not an absolute path"
            )));
        }
        let own_work = task.bundle.path.join(CRIU_WORK);
        let work = request.work.as_ref().unwrap_or(&own_work);
        let call = Checkpoint {
            id: task.id(),
            image: &request.image,
            work,
            leave_running: !request.exit,
            tcp: request.tcp,
            unix_sockets: request.unix_sockets,
            terminal: request.terminal,
            file_locks: request.file_locks,
            empty_namespaces: &request.empty_namespaces,
            cgroups_mode: &request.cgroups_mode,
        };
        let result = task.runtime.checkpoint(&call, &task.log()).await;
        let failed = result.is_err();
        if failed {
            thaw_left(&task).await;
        }
        let log = task.bundle.path.join("criu-dump.log");
        let (kept, work) = (log.clone(), work.clone());
        let is_own = request.work.is_none();
        blocking(move || {
            // There is no log where CRIU is missing.
            let _ = failed.then(|| std::fs::copy(work.join("dump.log"), kept));
            let _ = is_own.then(|| std::fs::remove_dir_all(work));
        })
        .await?;
        result.map_err(|error| Error::Checkpoint {
            message: error.to_string(),
            log,
        })
    }
}

/// A runtime or a CRIU that is killed leaves the container frozen that it has frozen.
async fn thaw_left(task: &Arc<Task>) {
    if task.init.now().phase() != Phase::Running {
        return;
    }
    let known = Known::of(task).await;
    if known.is_ok_and(|known| known.phase() == Some(Phase::Paused))
        && let Err(error) = task.runtime.resume(task.id(), &task.log()).await
    {
        warn!(id = %task.id(), %error, "cannot thaw a container that a failed checkpoint has frozen");
    }
}

/// Whether a call that the daemon before has made has written the image and ended the container.
/// That is known of the process before its exit is published.
async fn is_checkpointed(task: &Task, request: &CheckpointTask) -> Result<bool, Error> {
    let (process, inventory) = (task.init.process(), request.image.join(INVENTORY));
    blocking(move || {
        let has_ended = process.is_none_or(|process| process.has_ended().unwrap_or(false));
        has_ended && inventory.exists()
    })
    .await
}

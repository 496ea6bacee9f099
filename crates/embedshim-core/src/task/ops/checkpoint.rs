//! `Checkpoint`: the container's state to files, by CRIU. Owns where CRIU works, what is left of
//! its log, and that no container stays frozen by one that has failed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::sleep;
use tracing::warn;

use crate::blocking::blocking;
use crate::error::Error;
use crate::id::TaskKey;
use crate::runtime::{Checkpoint, is_criu_at_work};
use crate::task::api::CheckpointTask;
use crate::task::cut_short::Known;
use crate::task::engine::Engine;
use crate::task::launch::CRIU_WORK;
use crate::task::lifecycle::{Operation, Phase};
use crate::task::task::Task;

/// What CRIU writes last of an image.
const INVENTORY: &str = "inventory.img";
/// The time between two looks at a container that a predecessor's checkpoint has frozen.
const PAUSE: Duration = Duration::from_millis(250);

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
        task.set_checkpointing(true);
        if let Err(error) = self.save(&task).await {
            task.set_checkpointing(false);
            return Err(error);
        }
        let result = task.runtime.checkpoint(&call, &task.log()).await;
        let failed = result.is_err();
        if failed {
            thaw_left(&task).await;
        }
        self.note_end(&task).await;
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

impl Engine {
    /// Thaws a container that a predecessor's checkpoint has left frozen, once its runtime has
    /// ended: a CRIU that outlives that thaws it itself, unless it was killed, too.
    pub(in crate::task) async fn end_left_checkpoint(self: &Arc<Self>, task: &Arc<Task>) {
        let deadline = Instant::now() + self.config.runtime_deadline;
        while is_frozen(task).await
            && blocking(is_criu_at_work).await.unwrap_or(false)
            && Instant::now() < deadline
        {
            sleep(PAUSE).await;
        }
        thaw_left(task).await;
        self.note_end(task).await;
    }

    async fn note_end(&self, task: &Arc<Task>) {
        task.set_checkpointing(false);
        if let Err(error) = self.save(task).await {
            warn!(id = %task.id(), %error, "cannot store that a checkpoint is over");
        }
    }
}

/// Whether a container that is no paused one is frozen.
async fn is_frozen(task: &Arc<Task>) -> bool {
    let known = match task.init.now().phase() {
        Phase::Running => Known::of(task).await.ok(),
        _ => None,
    };
    known.is_some_and(|known| known.phase() == Some(Phase::Paused))
}

/// A runtime or a CRIU that is killed leaves the container frozen that it has frozen.
async fn thaw_left(task: &Arc<Task>) {
    if is_frozen(task).await
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

//! `Pause`, `Resume` and `Update`: what the runtime does to the cgroup of a container. Owns that a
//! container whose init ends meanwhile does not stay frozen.

use std::sync::Arc;

use tracing::{info, warn};

use crate::blocking::blocking;
use crate::error::Error;
use crate::event::EventKind;
use crate::id::TaskKey;
use crate::task::cut_short;
use crate::task::engine::Engine;
use crate::task::lifecycle::{Operation, Phase, Transition};
use crate::task::process::TaskProcess;
use crate::task::task::Task;

impl Engine {
    /// Freezes the container.
    pub(in crate::task) async fn pause(
        self: Arc<Self>,
        key: TaskKey,
        is_replay: bool,
    ) -> Result<(), Error> {
        let task = self.registry.task(&key)?;
        let _mutation = task.init.lock_mutations().await?;
        let now = task.init.now();
        if is_replay && now.phase() == Phase::Paused {
            return Ok(());
        }
        now.lifecycle.admit(Operation::Pause)?;
        task.init.advance(Transition::Freeze);
        // Saved first: a successor has to look whether it is frozen.
        let frozen = match self.save(&task).await {
            Ok(_) => task.runtime.pause(task.id(), &task.log()).await,
            Err(unsaved) => Err(unsaved),
        };
        if let Err(error) = frozen
            && cut_short::phase_after(&task, &error).await != Some(Phase::Paused)
        {
            task.init.advance(Transition::Thawed);
            // A successor would take it for one that is being paused until it has looked.
            if let Err(unsaved) = self.save(&task).await {
                warn!(
                    id = %task.id(), error = %unsaved,
                    "cannot store that a container is not paused"
                );
            }
            return Err(error);
        }
        let has_ended = task.init.now().lifecycle.known_exit().is_some();
        if has_ended || is_being_killed(&task.init).await? {
            // It ended while it was being frozen: frozen, the rest of it could not be ended, nor
            // the container deleted. Or it was killed and is frozen before it could end.
            task.init.advance(Transition::Thawed);
            task.runtime.resume(task.id(), &task.log()).await?;
            return Err(Error::WrongState("cannot pause a stopped container"));
        }
        self.change(&task, Transition::Frozen, EventKind::Paused)
            .await
    }

    /// Thaws it.
    pub(in crate::task) async fn resume(
        self: Arc<Self>,
        key: TaskKey,
        is_replay: bool,
    ) -> Result<(), Error> {
        let task = self.registry.task(&key)?;
        let _mutation = task.init.lock_mutations().await?;
        let now = task.init.now();
        if is_replay && now.phase() == Phase::Running {
            return Ok(());
        }
        now.lifecycle.admit(Operation::Resume)?;
        if let Err(error) = task.runtime.resume(task.id(), &task.log()).await
            && cut_short::phase_after(&task, &error).await != Some(Phase::Running)
        {
            return Err(error);
        }
        self.change(&task, Transition::Thawed, EventKind::Resumed)
            .await
    }

    /// Emits the change unless the init has ended meanwhile: then its exit is the news.
    async fn change(
        &self,
        task: &Arc<Task>,
        change: Transition,
        event: EventKind,
    ) -> Result<(), Error> {
        if task.init.advance(change) {
            let phase = task.init.now().phase();
            info!(namespace = %task.key.namespace, id = %task.id(), ?phase, "changed");
            self.emit(task, event);
        }
        self.save(task).await.map(drop)
    }

    /// Changes resource limits.
    pub(in crate::task) async fn update(
        self: Arc<Self>,
        key: TaskKey,
        resources: Vec<u8>,
    ) -> Result<(), Error> {
        let task = self.registry.task(&key)?;
        let _mutation = task.init.lock_mutations().await?;
        task.init.now().lifecycle.admit(Operation::Update)?;
        task.runtime.update(task.id(), resources, &task.log()).await
    }
}

/// Whether a SIGKILL was sent that it has not taken.
async fn is_being_killed(init: &TaskProcess) -> Result<bool, Error> {
    let Some(process) = init.process() else {
        return Ok(false);
    };
    blocking(move || process.is_being_killed()).await
}

//! What can be done to a running container from outside: signals, freezing, limits.
//! Never changes who its processes are.

use std::sync::Arc;

use tracing::info;

use super::container::Task;
use super::process::TaskProcess;
use super::shared::Shared;
use super::state::{Operation, Phase};
use crate::error::Error;
use crate::event::EventKind;
use crate::id::{ProcessKey, TaskKey};

/// Sends a signal to one process, or with `all` to all of its container.
pub(super) async fn kill(
    shared: Arc<Shared>,
    key: ProcessKey,
    signal: u32,
    all: bool,
) -> Result<(), Error> {
    let (task, process) = shared.process(&key)?;
    if process.exec.is_some() {
        return kill_exec(&process, signal).await;
    }
    let phase = process.now().phase;
    phase.admit(Operation::Kill)?;
    // runc thaws a frozen cgroup for SIGKILL, and knows who "all" are.
    if all || matches!(phase, Phase::Pausing | Phase::Paused) {
        return task
            .runtime
            .kill(task.id(), signal, all, &task.kill_log())
            .await;
    }
    send(&process, signal)
}

async fn kill_exec(process: &TaskProcess, signal: u32) -> Result<(), Error> {
    if process.now().phase == Phase::Created {
        // It may be starting at this moment: then its turn comes when it runs.
        let _turn = process.turn().await?;
        if process.now().phase == Phase::Created {
            return Err(Error::NotStarted);
        }
    }
    process.now().phase.admit(Operation::Kill)?;
    send(process, signal)
}

/// By pidfd, which can't hit another process. The same as `runc kill` without the 10 ms of starting it.
fn send(process: &TaskProcess, signal: u32) -> Result<(), Error> {
    let Some(target) = process.process() else {
        return Err(Error::AlreadyFinished);
    };
    let signal =
        i32::try_from(signal).map_err(|_| Error::Kill(format!("signal {signal} is not valid")))?;
    match target.signal(signal) {
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Err(Error::AlreadyFinished),
        Err(e) => Err(Error::Kill(e.to_string())),
        Ok(()) => Ok(()),
    }
}

/// Freezes the container.
pub(super) async fn pause(shared: Arc<Shared>, key: TaskKey) -> Result<(), Error> {
    let task = shared.task(&key)?;
    let _turn = task.init.turn().await?;
    task.init.now().phase.admit(Operation::Pause)?;
    task.init.advance(Phase::Running, Phase::Pausing);
    if let Err(error) = task.runtime.pause(task.id(), &task.log()).await {
        task.init.advance(Phase::Pausing, Phase::Running);
        return Err(error);
    }
    if task.init.now().phase == Phase::Stopped {
        // It ended while it was being frozen: frozen, the rest of it could not be ended, nor the container deleted.
        task.runtime.resume(task.id(), &task.log()).await?;
        return Err(Error::WrongState("cannot pause a stopped container"));
    }
    settle(
        &shared,
        &task,
        Phase::Pausing,
        Phase::Paused,
        EventKind::Paused,
    )
    .await
}

/// Thaws it.
pub(super) async fn resume(shared: Arc<Shared>, key: TaskKey) -> Result<(), Error> {
    let task = shared.task(&key)?;
    let _turn = task.init.turn().await?;
    task.init.now().phase.admit(Operation::Resume)?;
    task.runtime.resume(task.id(), &task.log()).await?;
    settle(
        &shared,
        &task,
        Phase::Paused,
        Phase::Running,
        EventKind::Resumed,
    )
    .await
}

/// The new phase is told unless the init has ended meanwhile: then its exit is the news.
async fn settle(
    shared: &Shared,
    task: &Arc<Task>,
    from: Phase,
    to: Phase,
    told: EventKind,
) -> Result<(), Error> {
    if task.init.advance(from, to) {
        info!(namespace = %task.key.namespace, id = %task.id(), phase = ?to, "changed");
        shared.emit(task, told);
    }
    task.save(shared).await
}

/// Changes resource limits.
pub(super) async fn update(
    shared: Arc<Shared>,
    key: TaskKey,
    resources: Vec<u8>,
) -> Result<(), Error> {
    let task = shared.task(&key)?;
    let _turn = task.init.turn().await?;
    task.init.now().phase.admit(Operation::Update)?;
    task.runtime.update(task.id(), resources, &task.log()).await
}

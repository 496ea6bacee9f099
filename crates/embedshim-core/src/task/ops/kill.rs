//! What can be done to a running container from outside: signals, freezing, limits.
//! Never changes who its processes are.

use std::path::PathBuf;
use std::sync::Arc;

use tracing::info;

use crate::error::Error;
use crate::event::EventKind;
use crate::id::{ProcessKey, TaskKey};
use crate::runtime::Checkpoint;
use crate::task::api::CheckpointTask;
use crate::task::detached::blocking;
use crate::task::engine::Shared;
use crate::task::lifecycle::{Operation, Phase};
use crate::task::process::TaskProcess;
use crate::task::task::Task;

/// What CRIU writes last of an image.
const INVENTORY: &str = "inventory.img";
const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();

/// Sends a signal to one process, or with `all` to all of its container.
pub(in crate::task) async fn kill(
    shared: Arc<Shared>,
    key: ProcessKey,
    signal: u32,
    all: bool,
    is_again: bool,
) -> Result<(), Error> {
    match deliver(&shared, &key, signal, all).await {
        // It was sent before, perhaps, and this is what came of it.
        Err(Error::AlreadyFinished) if is_again => Ok(()),
        other => other,
    }
}

async fn deliver(shared: &Shared, key: &ProcessKey, signal: u32, all: bool) -> Result<(), Error> {
    let (task, process) = shared.process(key)?;
    if process.exec.is_some() {
        return kill_exec(&task, &process, signal).await;
    }
    let phase = process.now().phase;
    phase.admit(Operation::Kill)?;
    let is_paused = matches!(phase, Phase::Pausing | Phase::Paused);
    // The runtime knows who "all" are, and how to thaw what is in no cgroup that we know.
    if all || (is_paused && task.cgroup().is_none()) {
        return kill_by_runtime(&task, signal, all).await;
    }
    send(&process, signal)?;
    if signal == SIGKILL
        && let Some(cgroup) = task.cgroup()
    {
        // As `runc kill` does, whoever froze it.
        blocking(move || cgroup.thaw()).await?;
    }
    Ok(())
}

async fn kill_by_runtime(task: &Task, signal: u32, all: bool) -> Result<(), Error> {
    let log = task.own_log();
    let killed = task.runtime.kill(task.id(), signal, all, &log).await;
    forget_log(log).await;
    killed
}

/// Lets the runtime thaw a container without waiting for the init's turn.
pub(in crate::task) async fn thaw(task: &Task) -> Result<(), Error> {
    let log = task.own_log();
    let thawed = task.runtime.resume(task.id(), &log).await;
    forget_log(log).await;
    thawed
}

async fn forget_log(log: PathBuf) {
    // A left-over goes with the bundle.
    let _ = blocking(move || std::fs::remove_file(log).is_ok()).await;
}

async fn kill_exec(task: &Task, process: &TaskProcess, signal: u32) -> Result<(), Error> {
    if process.now().phase == Phase::Created {
        // It may be starting at this moment: then its turn comes when it runs.
        let _turn = process.turn().await?;
        if process.now().phase == Phase::Created {
            return Err(Error::NotStarted);
        }
    }
    process.now().phase.admit(Operation::Kill)?;
    send(process, signal)?;
    if signal == SIGKILL
        && let (Some(cgroup), Some(identity)) = (task.cgroup(), process.identity())
    {
        // Its container stays as it is.
        blocking(move || cgroup.release_killed(identity.pid)).await?;
    }
    Ok(())
}

/// By pidfd, which can't hit another process. The same as `runc kill` without the 10 ms of starting
/// it.
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
pub(in crate::task) async fn pause(
    shared: Arc<Shared>,
    key: TaskKey,
    is_again: bool,
) -> Result<(), Error> {
    let task = shared.task(&key)?;
    let _turn = task.init.turn().await?;
    let phase = task.init.now().phase;
    if is_again && phase == Phase::Paused {
        return Ok(());
    }
    phase.admit(Operation::Pause)?;
    task.init.advance(Phase::Running, Phase::Pausing);
    // Saved first: a successor has to look whether it is frozen.
    let frozen = match task.save(&shared).await {
        Ok(()) => task.runtime.pause(task.id(), &task.log()).await,
        unsaved => unsaved,
    };
    if let Err(error) = frozen {
        task.init.advance(Phase::Pausing, Phase::Running);
        return Err(error);
    }
    if task.init.now().phase == Phase::Stopped || is_being_killed(&task.init).await? {
        // It ended while it was being frozen: frozen, the rest of it could not be ended, nor the
        // container deleted. Or it was killed and is frozen before it could end.
        task.init.advance(Phase::Pausing, Phase::Running);
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

/// Whether a SIGKILL was sent that it has not taken.
async fn is_being_killed(init: &TaskProcess) -> Result<bool, Error> {
    let Some(process) = init.process() else {
        return Ok(false);
    };
    blocking(move || process.is_being_killed()).await
}

/// Thaws it.
pub(in crate::task) async fn resume(
    shared: Arc<Shared>,
    key: TaskKey,
    is_again: bool,
) -> Result<(), Error> {
    let task = shared.task(&key)?;
    let _turn = task.init.turn().await?;
    let phase = task.init.now().phase;
    if is_again && phase == Phase::Running {
        return Ok(());
    }
    phase.admit(Operation::Resume)?;
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
pub(in crate::task) async fn update(
    shared: Arc<Shared>,
    key: TaskKey,
    resources: Vec<u8>,
) -> Result<(), Error> {
    let task = shared.task(&key)?;
    let _turn = task.init.turn().await?;
    task.init.now().phase.admit(Operation::Update)?;
    task.runtime.update(task.id(), resources, &task.log()).await
}

/// Writes the container's state to files, by CRIU.
pub(in crate::task) async fn checkpoint(
    shared: Arc<Shared>,
    key: TaskKey,
    request: CheckpointTask,
    is_again: bool,
) -> Result<(), Error> {
    let task = shared.task(&key)?;
    let _turn = task.init.turn().await?;
    let has_ended = task.init.now().phase == Phase::Stopped;
    if is_again && request.exit && has_ended && request.image.join(INVENTORY).exists() {
        // It ended because that was asked for.
        return Ok(());
    }
    task.init.now().phase.admit(Operation::Checkpoint)?;
    if !request.image.is_absolute() {
        let path = request.image.display();
        return Err(Error::Invalid(format!(
            "checkpoint {path} is not an absolute path"
        )));
    }
    let own_work = task.bundle.path.join("criu-work");
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

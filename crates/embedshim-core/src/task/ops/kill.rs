//! `Kill`: a signal to one process, or to all of its container. Owns that SIGKILL ends a process
//! whatever froze it; never changes where a process is in its life.

use std::path::PathBuf;
use std::sync::Arc;

use crate::blocking::blocking;
use crate::error::Error;
use crate::id::ProcessKey;
use crate::task::engine::Engine;
use crate::task::lifecycle::{Operation, Phase};
use crate::task::process::TaskProcess;
use crate::task::task::Task;

const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();

impl Engine {
    /// Sends a signal to one process, or with `all` to all of its container.
    pub(in crate::task) async fn kill(
        self: Arc<Self>,
        key: ProcessKey,
        signal: u32,
        all: bool,
        is_replay: bool,
    ) -> Result<(), Error> {
        match self.deliver(&key, signal, all).await {
            // It was sent before, perhaps, and this is what came of it.
            Err(Error::AlreadyFinished) if is_replay => Ok(()),
            other => other,
        }
    }

    async fn deliver(&self, key: &ProcessKey, signal: u32, all: bool) -> Result<(), Error> {
        let (task, process) = self.registry.process(key)?;
        if process.exec.is_some() {
            return kill_exec(&task, &process, signal).await;
        }
        let now = process.now();
        now.lifecycle.admit(Operation::Kill)?;
        let is_paused = matches!(now.phase(), Phase::Pausing | Phase::Paused);
        // The runtime knows who "all" are, and how to thaw what is in no cgroup that we know.
        if all || (is_paused && task.cgroup().is_none()) {
            return kill_by_runtime(&task, signal, all).await;
        }
        send(&process, signal)?;
        if signal == SIGKILL
            && let Some(cgroup) = task.cgroup()
        {
            // As `runc kill` does, whatever froze it.
            blocking(move || cgroup.thaw()).await?;
        }
        Ok(())
    }
}

async fn kill_by_runtime(task: &Task, signal: u32, all: bool) -> Result<(), Error> {
    let log = task.own_log();
    let killed = task.runtime.kill(task.id(), signal, all, &log).await;
    remove_log(log).await;
    match killed {
        // It ended while the runtime looked at it, by another kill perhaps.
        Err(Error::Kill(_)) if has_ended(&task.init).await? => Err(Error::AlreadyFinished),
        other => other,
    }
}

async fn has_ended(init: &TaskProcess) -> Result<bool, Error> {
    let Some(process) = init.process() else {
        return Ok(true);
    };
    blocking(move || process.has_ended().unwrap_or(false)).await
}

/// Lets the runtime thaw a container, beside a mutation that is in flight.
pub(in crate::task) async fn thaw(task: &Task) -> Result<(), Error> {
    let log = task.own_log();
    let thawed = task.runtime.resume(task.id(), &log).await;
    remove_log(log).await;
    thawed
}

async fn remove_log(log: PathBuf) {
    // A left-over goes with the bundle.
    let _ = blocking(move || std::fs::remove_file(log).is_ok()).await;
}

async fn kill_exec(task: &Task, process: &TaskProcess, signal: u32) -> Result<(), Error> {
    if process.now().phase() == Phase::Created {
        // It may be starting at this moment: then the signal waits until it runs.
        let _mutation = process.lock_mutations().await?;
        if process.now().phase() == Phase::Created {
            return Err(Error::NotStarted);
        }
    }
    process.now().lifecycle.admit(Operation::Kill)?;
    send(process, signal)?;
    if signal == SIGKILL
        && let (Some(cgroup), Some(identity)) = (task.cgroup(), process.identity())
    {
        // Its container stays as it is.
        blocking(move || cgroup.release_killed(identity.pid)).await?;
    }
    Ok(())
}

/// By pidfd, which cannot hit another process. The same as `runc kill` without the 10 ms of
/// starting it.
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

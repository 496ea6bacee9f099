//! `Delete`, and the clean-up after a containerd that has given a container up.
//! Owns the order of the steps, each of which can be repeated: a delete that failed half-way is simply asked again.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tracing::{info, warn};

use crate::error::Error;
use crate::event::EventKind;
use crate::failpoint;
use crate::id::{ExecId, ProcessKey, TaskKey};
use crate::rootfs;
use crate::task::api::{Cleaned, Deleted, Exit};
use crate::task::context::Errand;
use crate::task::detached::blocking;
use crate::task::engine::Shared;
use crate::task::launch::{end_logger, remove_traces};
use crate::task::lifecycle::{Operation, Phase};
use crate::task::process::TaskProcess;
use crate::task::store::Bundle;
use crate::task::task::Task;

/// How long a killed process may take to end before a deletion is refused.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// How long somebody may keep the output open after the end of its process; runc-v2 waits as long.
const DRAIN_DEADLINE: Duration = Duration::from_secs(2);
/// The same for a clean-up, which containerd kills after 5 s.
const CLEANUP_KILL_DEADLINE: Duration = Duration::from_secs(3);

/// Deletes a stopped or never started process; with the init, the task.
pub(in crate::task) async fn delete(
    shared: Arc<Shared>,
    key: ProcessKey,
    errand: Errand,
) -> Result<Deleted, Error> {
    let (task, process) = shared.process(&key)?;
    let _turn = process.turn().await?;
    // A deletion we waited for may have done it.
    let (_, process) = shared.process(&key)?;
    let now = process.now();
    now.phase.admit(Operation::Delete)?;
    if let Some(exec) = &process.exec {
        return delete_exec(&shared, &task, &process, exec, &errand).await;
    }
    if now.phase == Phase::Created {
        end_created(&task).await?;
    }
    let deleted = Deleted {
        pid: now.pid,
        exit: process.now().exit,
    };
    dismantle(&shared, &task, false).await?;
    tell(&errand, deleted).await;
    if let Some(exit) = deleted.exit {
        shared.emit(
            &task,
            EventKind::Deleted {
                pid: now.pid,
                exit_code: exit.code,
                exited_at: exit.at,
            },
        );
    }
    forget(&shared, &task).await?;
    info!(namespace = %task.key.namespace, id = %task.id(), pid = now.pid, "deleted");
    Ok(deleted)
}

async fn delete_exec(
    shared: &Arc<Shared>,
    task: &Arc<Task>,
    process: &Arc<TaskProcess>,
    exec: &ExecId,
    errand: &Errand,
) -> Result<Deleted, Error> {
    drain(process).await;
    process.disconnect();
    end_logger(process).await;
    let now = process.now();
    let deleted = Deleted {
        pid: now.pid,
        exit: now.exit,
    };
    tell(errand, deleted).await;
    task.remove_exec(exec);
    task.save(shared).await?;
    Ok(deleted)
}

/// With the next step the last trace is gone from which a successor could answer.
async fn tell(errand: &Errand, deleted: Deleted) {
    if let Some(witness) = &errand.witness {
        witness.deleted(deleted).await;
    }
}

/// An init that was never started has to end before its container can go; its exit is told like any other.
async fn end_created(task: &Arc<Task>) -> Result<(), Error> {
    if task.init.identity().is_none() {
        // It was to be restored, and never was.
        return Ok(());
    }
    if let Some(process) = task.init.process() {
        // It may have ended by itself meanwhile.
        let _ = process.signal(libc::SIGKILL);
    }
    let ended = tokio::time::timeout(KILL_DEADLINE, task.init.ended()).await;
    ended
        .map_err(|_| Error::Deadline {
            what: "the end of a killed init",
            seconds: KILL_DEADLINE.as_secs(),
        })?
        .map(drop)
}

/// The steps, each of which finds out by itself whether it was done before.
async fn dismantle(shared: &Arc<Shared>, task: &Arc<Task>, force: bool) -> Result<(), Error> {
    let told = tokio::time::timeout(KILL_DEADLINE, task.exit_told());
    if task.init.identity().is_some() && told.await.is_err() {
        warn!(id = %task.id(), "deleted while an exec of it still runs");
    }
    drain(&task.init).await;
    delete_container(task, force).await?;
    if !task.rootfs.is_empty() {
        let target = task.rootfs_path();
        failpoint::step("before the root is unmounted");
        let unmounted = blocking(move || rootfs::unmount_recursive(&target)).await?;
        failpoint::step("after the root was unmounted");
        unmounted.map_err(Error::Rootfs)?;
    }
    shared.oom.unwatch(task.serial);
    for process in task.all_execs().iter().chain([&task.init]) {
        process.disconnect();
        end_logger(process).await;
        if let Some(identity) = process.identity().filter(|_| process.now().exit.is_none()) {
            shared.disown(identity);
            let _ = shared.monitor.unwatch(identity).await;
        }
    }
    Ok(())
}

/// The last step: the id is free.
async fn forget(shared: &Arc<Shared>, task: &Arc<Task>) -> Result<(), Error> {
    let (store, key) = (shared.store.clone(), task.key.clone());
    blocking(move || store.remove(&key)).await??;
    shared.release(task);
    Ok(())
}

/// A container whose init ended while it was being frozen, perhaps by a daemon that is gone, has to be thawed first.
async fn delete_container(task: &Task, force: bool) -> Result<(), Error> {
    let log = task.log();
    let Err(error) = task.runtime.delete(task.id(), force, &log).await else {
        return Ok(());
    };
    if task.runtime.resume(task.id(), &log).await.is_err() {
        return Err(error);
    }
    task.runtime.delete(task.id(), force, &log).await
}

async fn drain(process: &TaskProcess) {
    if let Some(streams) = process.streams() {
        streams.drained(DRAIN_DEADLINE).await;
    }
}

/// containerd has given this bundle up: whatever lives in it is killed, everything is removed.
pub(in crate::task) async fn cleanup(
    shared: Arc<Shared>,
    key: TaskKey,
    bundle: PathBuf,
) -> Result<Cleaned, Error> {
    let Some(task) = shared.task_even_unfinished(&key) else {
        return Ok(Cleaned::Unknown);
    };
    if !is_bundle_of(&task, &bundle).await? {
        return Ok(Cleaned::Replaced);
    }
    task.silence();
    let _turn = task.init.turn().await?;
    if shared
        .task_even_unfinished(&key)
        .is_none_or(|found| !Arc::ptr_eq(&found, &task))
    {
        return Ok(Cleaned::Replaced);
    }
    let exit = end_all(&task).await?;
    let pid = task.init.now().pid;
    let removed = match dismantle(&shared, &task, true).await {
        Ok(()) => forget(&shared, &task).await,
        failed => failed,
    };
    if let Err(error) = removed {
        warn!(id = %task.id(), %error, "a clean-up step failed; going on");
        remove_traces(&shared, &task, true).await;
        shared.release(&task);
    }
    info!(namespace = %key.namespace, id = %key.id, pid, "cleaned up: containerd has given it up");
    Ok(Cleaned::Removed { pid, exit })
}

/// The same id may have a new container by now, whose bundle has the same path (`containerd.md` 11.9).
async fn is_bundle_of(task: &Task, bundle: &Path) -> Result<bool, Error> {
    if task.bundle.path != bundle {
        return Ok(false);
    }
    let path = bundle.to_owned();
    let found = blocking(move || Bundle::open(&path)).await?;
    // A bundle that is gone cannot be a newer one.
    Ok(found.map_or(true, |found| found == task.bundle))
}

async fn end_all(task: &Arc<Task>) -> Result<Exit, Error> {
    if let Some(exit) = task.init.now().exit {
        return Ok(exit);
    }
    if let Some(process) = task.init.process() {
        let _ = process.signal(libc::SIGKILL);
    }
    if let Some(cgroup) = task.cgroup()
        && let Err(error) = blocking(move || cgroup.kill_all()).await?
    {
        warn!(id = %task.id(), %error, "cannot kill all processes of a container");
    }
    match tokio::time::timeout(CLEANUP_KILL_DEADLINE, task.init.ended()).await {
        Ok(exit) => exit,
        // In uninterruptible sleep, say. It is as good as dead, and 137 is what it will have ended with.
        Err(_) => Ok(Exit {
            code: 137,
            at: SystemTime::now(),
            status: None,
        }),
    }
}

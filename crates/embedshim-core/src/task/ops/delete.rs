//! `Delete`. Owns the order of the steps, each of which can be repeated: a deletion that failed
//! half-way is simply asked for again.

use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};

use crate::blocking::blocking;
use crate::error::Error;
use crate::event::EventKind;
use crate::failpoint;
use crate::id::{ExecId, ProcessKey};
use crate::rootfs;
use crate::task::api::Deleted;
use crate::task::context::RequestContext;
use crate::task::engine::Engine;
use crate::task::lifecycle::{Operation, Phase};
use crate::task::process::TaskProcess;
use crate::task::task::Task;
use crate::task::teardown::end_logger;

/// How long a killed process may take to end before a deletion is refused.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// How long another process may keep the output open after the end of its process; runc-v2 waits as
/// long.
const DRAIN_DEADLINE: Duration = Duration::from_secs(2);

impl Engine {
    /// Deletes a stopped or never started process; with the init, the task.
    pub(in crate::task) async fn delete(
        self: Arc<Self>,
        key: ProcessKey,
        context: RequestContext,
    ) -> Result<Deleted, Error> {
        let (task, process) = self.registry.process(&key)?;
        let _mutation = process.lock_mutations().await?;
        // A deletion that held the lock may have done it.
        let (_, process) = self.registry.process(&key)?;
        let now = process.now();
        now.lifecycle.admit(Operation::Delete)?;
        if let Some(exec) = &process.exec {
            return self.delete_exec(&task, &process, exec, &context).await;
        }
        if now.phase() == Phase::Created {
            end_created(&task).await?;
        }
        let deleted = Deleted {
            pid: now.pid,
            exit: process.now().exit(),
        };
        self.dismantle(&task, false).await?;
        observe(&context, deleted).await;
        if let Some(exit) = deleted.exit {
            self.emit(
                &task,
                EventKind::Deleted {
                    pid: now.pid,
                    exit_code: exit.code,
                    exited_at: exit.at,
                },
            );
        }
        self.free_id(&task).await?;
        info!(namespace = %task.key.namespace, id = %task.id(), pid = now.pid, "deleted");
        Ok(deleted)
    }

    async fn delete_exec(
        &self,
        task: &Arc<Task>,
        process: &Arc<TaskProcess>,
        exec: &ExecId,
        context: &RequestContext,
    ) -> Result<Deleted, Error> {
        drain(process).await;
        process.disconnect();
        end_logger(process).await;
        let now = process.now();
        let deleted = Deleted {
            pid: now.pid,
            exit: now.exit(),
        };
        observe(context, deleted).await;
        task.remove_exec(exec);
        self.save(task).await?;
        Ok(deleted)
    }

    /// Takes the task apart. Each step finds out by itself whether it was done before.
    pub(in crate::task) async fn dismantle(
        &self,
        task: &Arc<Task>,
        force: bool,
    ) -> Result<(), Error> {
        let emitted = tokio::time::timeout(KILL_DEADLINE, task.exit_emitted());
        if task.init.identity().is_some() && emitted.await.is_err() {
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
        self.oom.unwatch(task.serial);
        for process in task.all_execs().iter().chain([&task.init]) {
            process.disconnect();
            end_logger(process).await;
            if process.now().exit().is_none()
                && let Some(identity) = process.identity()
            {
                self.unwatch(task, identity).await;
            }
        }
        Ok(())
    }

    /// The last step: the id is free.
    pub(in crate::task) async fn free_id(&self, task: &Arc<Task>) -> Result<(), Error> {
        self.remove_record(task).await?;
        self.registry.release(task);
        Ok(())
    }
}

/// With the next step the last trace is gone from which a successor could answer.
async fn observe(context: &RequestContext, deleted: Deleted) {
    if let Some(observer) = &context.observer {
        observer.deleted(deleted).await;
    }
}

/// An init that was never started has to end before its container can go; its exit is emitted like
/// any other.
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

/// A container whose init ended while it was being frozen, perhaps by a daemon that is gone, has to
/// be thawed first.
async fn delete_container(task: &Task, force: bool) -> Result<(), Error> {
    let log = task.log();
    let is_over = !force && task.traits.own_pid_namespace && task.init.now().exit().is_some();
    let deleted = match task.init.identity().filter(|_| is_over) {
        Some(init) => task.runtime.delete_ended(task.id(), init, &log).await,
        None => task.runtime.delete(task.id(), force, &log).await,
    };
    let Err(error) = deleted else {
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

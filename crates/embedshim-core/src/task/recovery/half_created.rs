//! A creation whose daemon died within it. Owns what becomes of it: a container that the runtime
//! has made is taken over, or a creation that takes longer than the time between two kills would
//! never end; anything else is removed, and made again by the request that comes again.

use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;
use tracing::{info, warn};

use crate::error::Error;
use crate::process::Process;
use crate::reaper::ReapGuard;
use crate::runtime::{RuntimeStatus, wait_for};
use crate::stdio::{self, Plan};
use crate::task::engine::Engine;
use crate::task::launch::{find_cgroup, open_reported, read_pid};
use crate::task::recovery::streams::{connect, take_terminal};
use crate::task::task::Task;
use crate::task::teardown::end_logger;

impl Engine {
    /// Finishes the creation, in a task of its own. Who wants the id waits for that.
    pub(super) fn finish_creation(self: &Arc<Self>, task: Arc<Task>, calls: Vec<Process>) {
        task.mark_half_created();
        let half_created = HalfCreated {
            // Until the init is watched, no orphan is reaped: it might be the init.
            _guard: self.reaper.guard(),
            _lock: task.init.try_lock_mutations(),
            engine: Arc::clone(self),
            task,
        };
        let mutation = self.mutation();
        tokio::spawn(async move {
            half_created.decide(&calls).await;
            drop(mutation);
        });
    }
}

struct HalfCreated {
    engine: Arc<Engine>,
    task: Arc<Task>,
    _guard: ReapGuard,
    /// A clean-up waits for it.
    _lock: Option<OwnedSemaphorePermit>,
}

impl HalfCreated {
    async fn decide(&self, calls: &[Process]) {
        let (engine, task) = (&self.engine, &self.task);
        wait_for(calls, engine.config.runtime_deadline).await;
        match self.adopt().await {
            Ok(pid) => {
                info!(
                    namespace = %task.key.namespace, id = %task.id(), pid,
                    "container created by a predecessor"
                );
                engine.release_exit(task, &task.init);
                task.mark_adopted();
            }
            Err(reason) => {
                warn!(id = %task.id(), %reason, "removing a half-created task");
                self.remove().await;
            }
        }
    }

    /// Takes over the container that the runtime has made, with its streams.
    async fn adopt(&self) -> Result<u32, Error> {
        let (engine, task) = (&self.engine, &self.task);
        let not_made = |why: &str| Error::Internal(why.into());
        if task.checkpoint.is_some() {
            return Err(not_made("its creation calls no runtime"));
        }
        let plan = Plan::parse(&task.init.stdio)?;
        let pid = read_pid(&task.pid_file()).await?;
        let known = task.runtime.state(task.id(), &task.log()).await?;
        // A pid file can be an earlier attempt's.
        if known.status != RuntimeStatus::Created || known.pid != pid {
            return Err(not_made("the runtime has not made it"));
        }
        if !stdio::are_kept(&plan, &task.init.fds) {
            return Err(not_made("its streams went with the daemon"));
        }
        if plan.logger().is_some() && !self.has_living_logger() {
            return Err(not_made("its logger has ended"));
        }
        task.init.begin()?;
        let process = Arc::new(open_reported(pid)?);
        if plan.terminal() {
            take_terminal(task, &task.init).await;
            if !stdio::has_terminal(&task.init.fds) {
                return Err(not_made("its terminal went with the daemon"));
            }
        }
        task.init.note_pipes();
        connect(&engine.idle, task, &task.init);
        task.set_cgroup(find_cgroup(pid).await);
        engine.watch(task, &task.init, process).await?;
        engine.watch_for_oom(task);
        engine.complete_creation(task).await
    }

    fn has_living_logger(&self) -> bool {
        let logger = self.task.init.logger().map(Process::reopen);
        logger.is_some_and(|logger| logger.is_ok_and(|logger| !logger.has_ended().unwrap_or(true)))
    }

    /// Removes the task. Its id is free afterwards, for the request that comes again.
    async fn remove(&self) {
        let (engine, task) = (&self.engine, &self.task);
        if let Some(identity) = task.init.identity() {
            engine.unwatch(task, identity).await;
            task.init.unmake();
        }
        engine.oom.unwatch(task.serial);
        end_logger(&task.init).await;
        // What is in the pipes are the runtime's words; the client reads on, and gets the output of
        // the next attempt. From the removal of the record on, the request that is noted beside the
        // client's ends is all that says whose they are.
        let (fds, request) = (&task.init.fds, task.init.made_by);
        stdio::discard_pipes(fds);
        fds.leave_to(request.map(|request| (request.connection, request.stream)));
        engine.remove_traces(task, true).await;
        engine.leave_client_ends(request, fds.clone());
        engine.registry.release(task);
    }
}

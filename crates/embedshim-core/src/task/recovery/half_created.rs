//! A creation whose daemon died within it. Owns what becomes of it: a container that the runtime
//! has made is taken over, or a creation that takes longer than the time between two kills would
//! never end; anything else is removed, and made again by the request that comes again.

use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;
use tracing::{info, warn};

use crate::error::Error;
use crate::process::Process;
use crate::reaper::Ticket;
use crate::runtime::wait_for;
use crate::stdio::{self, Plan};
use crate::task::engine::Shared;
use crate::task::exits;
use crate::task::launch::{
    created, end_logger, find_cgroup, opened, read_pid, remove_traces, watch_for_oom,
};
use crate::task::recovery::finish::{connect, take_terminal};
use crate::task::task::Task;

/// Finishes the creation, in a task of its own. Who wants the id waits for that.
pub(in crate::task) fn finish(shared: &Arc<Shared>, task: Arc<Task>, calls: Vec<Process>) {
    task.is_to_be_settled();
    let half_created = HalfCreated {
        // Until the init is watched, no orphan is reaped: it might be the init.
        _ticket: shared.orphans.ticket(),
        _turn: task.init.turn_now(),
        shared: Arc::clone(shared),
        task,
    };
    let work = shared.work();
    tokio::spawn(async move {
        half_created.settle(&calls).await;
        drop(work);
    });
}

struct HalfCreated {
    shared: Arc<Shared>,
    task: Arc<Task>,
    _ticket: Ticket,
    /// A clean-up waits for it.
    _turn: Option<OwnedSemaphorePermit>,
}

impl HalfCreated {
    async fn settle(&self, calls: &[Process]) {
        let (shared, task) = (&self.shared, &self.task);
        wait_for(calls, shared.config.runtime_deadline).await;
        match self.adopt().await {
            Ok(pid) => {
                info!(namespace = %task.key.namespace, id = %task.id(), pid, "created by a predecessor");
                exits::release_early(shared, task, &task.init);
                task.was_settled();
            }
            Err(reason) => {
                warn!(id = %task.id(), %reason, "removing a task whose creation was cut short");
                self.remove().await;
            }
        }
    }

    /// Takes over the container that the runtime has made, with its streams.
    async fn adopt(&self) -> Result<u32, Error> {
        let (shared, task) = (&self.shared, &self.task);
        let not_made = |why: &str| Error::Internal(why.into());
        if task.checkpoint.is_some() {
            return Err(not_made("its creation calls no runtime"));
        }
        let plan = Plan::parse(&task.init.stdio)?;
        let pid = read_pid(&task.pid_file()).await?;
        let known = task.runtime.state(task.id(), &task.log()).await?;
        // A pid file can be an earlier attempt's.
        if known.status != "created" || known.pid != pid {
            return Err(not_made("the runtime has not made it"));
        }
        if !stdio::are_kept(&plan, &task.init.fds) {
            return Err(not_made("its streams went with the daemon"));
        }
        if plan.logger().is_some() && !self.has_living_logger() {
            return Err(not_made("its logger has ended"));
        }
        task.init.starting();
        let process = Arc::new(opened(pid)?);
        if plan.terminal() {
            take_terminal(task, &task.init).await;
            if !stdio::has_terminal(&task.init.fds) {
                return Err(not_made("its terminal went with the daemon"));
            }
        }
        task.init.note_pipes();
        connect(task, &task.init);
        task.set_cgroup(find_cgroup(pid).await);
        shared.watch(task, &task.init, process).await?;
        watch_for_oom(shared, task);
        created(shared, task).await
    }

    fn has_living_logger(&self) -> bool {
        let logger = self.task.init.logger().map(Process::reopen);
        logger.is_some_and(|logger| logger.is_ok_and(|logger| !logger.has_ended().unwrap_or(true)))
    }

    /// Removes the task. Its id is free afterwards, for the request that comes again.
    async fn remove(&self) {
        let (shared, task) = (&self.shared, &self.task);
        if let Some(identity) = task.init.identity() {
            shared.disown(identity);
            let _ = shared.monitor.unwatch(identity).await;
            task.init.unmake();
        }
        shared.oom.unwatch(task.serial);
        end_logger(&task.init).await;
        // What is in the pipes are the runtime's words; the client reads on, and gets the output of
        // the next attempt. From the removal of the record on, the request that is noted beside the
        // client's ends is all that says whose they are.
        let (fds, request) = (&task.init.fds, task.init.made_by);
        stdio::discard_pipes(fds);
        fds.leave_to(request.map(|request| (request.connection, request.stream)));
        remove_traces(shared, task, true).await;
        shared.leave_client_ends(request, fds.clone());
        shared.release(task);
    }
}

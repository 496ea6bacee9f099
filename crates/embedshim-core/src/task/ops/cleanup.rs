//! The clean-up after a containerd that has given a container up. Owns that it hits the container
//! of that bundle and no newer one (invariant 11), and that it comes to an end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tracing::{info, warn};

use crate::blocking::blocking;
use crate::bundle::Bundle;
use crate::error::Error;
use crate::id::TaskKey;
use crate::task::api::{Cleaned, Exit};
use crate::task::engine::Engine;
use crate::task::task::Task;

/// How long a killed init may take to end: containerd kills a clean-up after 5 s.
const KILL_DEADLINE: Duration = Duration::from_secs(3);

impl Engine {
    /// containerd has given this bundle up: what lives in it is killed, everything is removed.
    pub(in crate::task) async fn cleanup(
        self: Arc<Self>,
        key: TaskKey,
        bundle: PathBuf,
    ) -> Result<Cleaned, Error> {
        let Some(task) = self.registry.task_even_unfinished(&key) else {
            return Ok(Cleaned::Unknown);
        };
        if !is_bundle_of(&task, &bundle).await? {
            return Ok(Cleaned::Replaced);
        }
        self.clean_up_task(task).await
    }

    /// The same for a task of a sandbox whose bundle is gone: containerd has removed it after it
    /// lost the task's connection, and tells no launcher of it.
    pub(in crate::task) async fn clean_up_if_abandoned(
        self: Arc<Self>,
        task: Arc<Task>,
    ) -> Result<(), Error> {
        let bundle = task.bundle.clone();
        let is_there = move || Bundle::open(&bundle.path).is_ok_and(|found| found == bundle);
        if task.sandbox.is_none() || blocking(is_there).await? {
            return Ok(());
        }
        warn!(id = %task.id(), "the bundle of a task in a sandbox is gone: containerd has given it up");
        self.clean_up_task(task).await.map(drop)
    }

    async fn clean_up_task(self: Arc<Self>, task: Arc<Task>) -> Result<Cleaned, Error> {
        let key = task.key.clone();
        task.give_up();
        let _mutation = task.init.lock_mutations().await?;
        if self
            .registry
            .task_even_unfinished(&key)
            .is_none_or(|found| !Arc::ptr_eq(&found, &task))
        {
            return Ok(Cleaned::Replaced);
        }
        let exit = end_all(&task).await?;
        let pid = task.init.now().pid;
        let removed = match self.dismantle(&task, true).await {
            Ok(()) => self.free_id(&task).await,
            failed => failed,
        };
        if let Err(error) = removed {
            warn!(id = %task.id(), %error, "a clean-up step failed; going on");
            self.remove_traces(&task, true).await;
            self.registry.release(&task);
        }
        info!(
            namespace = %key.namespace, id = %key.id, pid,
            "cleaned up: containerd has given it up"
        );
        Ok(Cleaned::Removed { pid, exit })
    }
}

/// Whether the task was made from the directory that has this path now: the same id can have a new
/// container whose bundle has the same path.
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
    if let Some(exit) = task.init.now().exit() {
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
    match tokio::time::timeout(KILL_DEADLINE, task.init.ended()).await {
        Ok(exit) => exit,
        // In uninterruptible sleep, say. It will end with 137 when it wakes up (the exception of
        // invariant 4).
        Err(_) => Ok(Exit {
            code: 137,
            at: SystemTime::now(),
            status: None,
            evidence: None,
        }),
    }
}

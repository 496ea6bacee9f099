//! What an operator sees of a node at one moment: [`TaskOverview`] and its parts. Owns the shapes,
//! and how they are read from tasks in memory; never waits for a task, a runtime or a file system.

use std::path::PathBuf;
use std::time::Duration;

use crate::clock::BootTime;
use crate::id::{ExecId, SandboxId, TaskKey};
use crate::stdio::StdioPaths;
use crate::task::api::{Exit, ProcessStatus};
use crate::task::process::TaskProcess;
use crate::task::task::Task;

/// A task at one moment.
#[derive(Clone, Debug)]
pub struct TaskOverview {
    /// Its name.
    pub key: TaskKey,
    /// Its bundle.
    pub bundle: PathBuf,
    /// The file name of its OCI runtime.
    pub runtime: String,
    /// What [`CreateTask::owner`](super::CreateTask::owner) said.
    pub owner: String,
    /// The sandbox that it is in, if that is one of [`Sandboxes`](crate::sandbox::Sandboxes).
    pub sandbox: Option<SandboxId>,
    /// Its `Create` is over: clients can see it.
    pub is_complete: bool,
    /// The directory of its cgroup that lists its processes.
    pub cgroup: Option<PathBuf>,
    /// How many of its processes the kernel has killed for want of memory, as far as known.
    pub oom_kills: u64,
    /// Its init.
    pub init: ProcessOverview,
    /// Its other processes that clients have asked for, by name.
    pub execs: Vec<ProcessOverview>,
}

/// A process of a task at one moment.
#[derive(Clone, Debug)]
pub struct ProcessOverview {
    /// The exec's name; `None` for an init.
    pub exec: Option<ExecId>,
    /// Its pid; 0 as long as there is none. Kept after the end.
    pub pid: u32,
    /// Its state.
    pub status: ProcessStatus,
    /// How long ago the process began, if it did.
    pub age: Option<Duration>,
    /// How it ended, if it did.
    pub exit: Option<Exit>,
    /// Its standard streams.
    pub stdio: StdioPaths,
    /// Its streams that wait for the other end now.
    pub blocked: Vec<BlockedStream>,
}

/// A stream that has bytes, and whose other end takes none of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockedStream {
    /// `stdin`, `stdout` or `stderr`.
    pub stream: &'static str,
    /// For how long nothing was taken.
    pub time: Duration,
}

impl TaskOverview {
    pub(crate) fn of(task: &Task) -> Self {
        let now = BootTime::now();
        let execs = task.all_execs();
        Self {
            key: task.key.clone(),
            bundle: task.bundle.path.clone(),
            runtime: task.runtime.program_name().to_string_lossy().into_owned(),
            owner: task.owner.clone(),
            sandbox: task.sandbox.clone(),
            is_complete: task.is_complete(),
            cgroup: task.cgroup().and_then(|cgroup| cgroup.path()),
            oom_kills: task.oom_kills(),
            init: ProcessOverview::of(&task.init, now),
            execs: execs
                .iter()
                .map(|exec| ProcessOverview::of(exec, now))
                .collect(),
        }
    }
}

impl ProcessOverview {
    fn of(process: &TaskProcess, now: BootTime) -> Self {
        let state = process.now();
        let began = process.identity().map(|identity| identity.start_ticks);
        let streams = process.streams();
        Self {
            exec: process.exec.clone(),
            pid: state.pid,
            status: state.phase().status(),
            age: began.map(|ticks| now.since(BootTime::of_ticks(ticks))),
            exit: state.exit(),
            stdio: process.stdio.clone(),
            blocked: streams.map_or_else(Vec::new, |streams| {
                let blocked = streams.blocked().into_iter();
                let seen = blocked.map(|(stream, since)| BlockedStream {
                    stream,
                    time: now.since(since),
                });
                seen.collect()
            }),
        }
    }
}

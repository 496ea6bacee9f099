//! [`Event`]: the lifecycle of tasks as typed facts, in the order in which they became true.
//! Owns the shapes; who hears of them is the caller's business.

use std::fmt;
use std::path::PathBuf;
use std::time::SystemTime;

use crate::id::{ContainerId, ExecId, Namespace};
use crate::rootfs::Mount;
use crate::stdio::StdioPaths;

/// Who is to hear of every event, at the moment in which it becomes true.
///
/// An event is emitted before the change that it reports is durable (but for exits, which are
/// emitted again after a restart until their task is deleted): a sink that makes it durable in
/// `accept` never misses one, and may hear one twice. Called by the runtime's thread, so it must
/// not wait.
pub trait EventSink: fmt::Debug + Send + Sync {
    /// Takes the next event, in order.
    fn accept(&self, event: Event);
}

/// One fact about one task.
#[derive(Clone, Debug)]
pub struct Event {
    /// The task's namespace.
    pub namespace: Namespace,
    /// The task's container.
    pub id: ContainerId,
    /// What [`CreateTask::owner`](crate::task::CreateTask::owner) said.
    pub owner: String,
    /// When it became true.
    pub at: SystemTime,
    /// What became true.
    pub kind: EventKind,
}

/// What became true. Per task: `Created` < `Started` < `Exited` < `Deleted`; per exec: `ExecAdded`
/// < `ExecStarted` < `Exited`; the init's `Exited` is the last of its container; `Oom` precedes the
/// exit it causes.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum EventKind {
    /// The container exists and its init waits to be started.
    Created {
        /// The bundle directory.
        bundle: PathBuf,
        /// The mounts of the request.
        rootfs: Vec<Mount>,
        /// The standard streams of the request.
        stdio: StdioPaths,
        /// The checkpoint it is to be restored from.
        checkpoint: Option<PathBuf>,
        /// The init.
        pid: u32,
    },
    /// The init runs.
    Started {
        /// The init.
        pid: u32,
    },
    /// A process ended.
    Exited {
        /// Which exec, or the init.
        exec: Option<ExecId>,
        /// Its pid.
        pid: u32,
        /// Its exit code as containerd counts it.
        exit_code: u32,
        /// When it ended.
        exited_at: SystemTime,
    },
    /// The task is gone.
    Deleted {
        /// The init.
        pid: u32,
        /// Its exit code.
        exit_code: u32,
        /// When it ended.
        exited_at: SystemTime,
    },
    /// An exec was declared.
    ExecAdded {
        /// Which.
        exec: ExecId,
    },
    /// An exec runs.
    ExecStarted {
        /// Which.
        exec: ExecId,
        /// Its pid.
        pid: u32,
    },
    /// All processes are frozen.
    Paused,
    /// They run again.
    Resumed,
    /// The kernel killed a process of this container for want of memory.
    Oom,
}

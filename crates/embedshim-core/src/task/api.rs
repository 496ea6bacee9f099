//! What goes into and comes out of [`Node`](super::Node): plain data with checked names.

use std::path::PathBuf;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::exit::{Evidence, ExitStatus};
use crate::id::{ExecId, ProcessKey, SandboxId, TaskKey};
use crate::rootfs::Mount;
use crate::runtime::RuntimeOptions;
use crate::stdio::StdioPaths;

/// A request for a new task.
#[derive(Clone, Debug)]
pub struct CreateTask {
    /// Its name.
    pub key: TaskKey,
    /// The bundle directory, absolute, with `config.json`.
    pub bundle: PathBuf,
    /// What to mount on `rootfs` in the bundle; nothing if the spec names a ready root.
    pub rootfs: Vec<Mount>,
    /// Standard streams of the init.
    pub stdio: StdioPaths,
    /// How to call the OCI runtime.
    pub runtime: RuntimeOptions,
    /// The image of a checkpoint to restore at `Start`; until then the container does not exist.
    pub checkpoint: Option<PathBuf>,
    /// Opaque to us: kept with the task and given back with every event. Who is to hear of it, say.
    pub owner: String,
    /// The sandbox that it is in, if that is one of [`Sandboxes`](crate::sandbox::Sandboxes). Its
    /// client tells that it has given the task up by the removal of the bundle alone
    /// ([`Node::clean_up_abandoned`](super::Node::clean_up_abandoned)).
    pub sandbox: Option<SandboxId>,
}

/// A request for an additional process.
#[derive(Clone, Debug)]
pub struct ExecProcess {
    /// In which task.
    pub task: TaskKey,
    /// Its name.
    pub exec: ExecId,
    /// Its standard streams.
    pub stdio: StdioPaths,
    /// The OCI `Process` as JSON.
    pub spec: Vec<u8>,
}

/// A request for a checkpoint by CRIU.
#[expect(clippy::struct_excessive_bools, reason = "CRIU's own switches")]
#[derive(Clone, Debug, Default)]
pub struct CheckpointTask {
    /// Where its image goes: an absolute path.
    pub image: PathBuf,
    /// Where CRIU works and logs; `None` for a directory in the bundle that is removed afterwards.
    pub work: Option<PathBuf>,
    /// The container ends with it.
    pub exit: bool,
    /// Allow open TCP connections.
    pub tcp: bool,
    /// Allow external unix sockets.
    pub unix_sockets: bool,
    /// Allow a shell job.
    pub terminal: bool,
    /// Allow file locks.
    pub file_locks: bool,
    /// Namespaces that are to be made again, not restored.
    pub empty_namespaces: Vec<String>,
    /// What becomes of cgroups: `soft`, `full` or `strict`; empty for the runtime's default.
    pub cgroups_mode: String,
}

/// How a process ended, as its waiters learn it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Its exit code as containerd counts it; 255 also stands for unknown.
    pub code: u32,
    /// When.
    pub at: SystemTime,
    /// The same in full, which tells 255 from unknown. `None` if no end was seen (it never ran, or
    /// cannot be killed), or if a version without this field recorded it.
    #[serde(default)]
    pub status: Option<ExitStatus>,
    /// Where the status is from. `None` if no end was seen, or if a version without this field
    /// recorded it.
    #[serde(default)]
    pub evidence: Option<Evidence>,
}

/// The state of a process as the API shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProcessStatus {
    /// It exists but was not started.
    Created,
    /// It runs.
    Running,
    /// It ended.
    Stopped,
    /// It is frozen.
    Paused,
    /// It is being frozen.
    Pausing,
}

/// A process at one moment.
#[derive(Clone, Debug)]
pub struct ProcessSnapshot {
    /// Which.
    pub key: ProcessKey,
    /// The task's bundle.
    pub bundle: PathBuf,
    /// Its pid; 0 for an exec that was never started. Kept after the end.
    pub pid: u32,
    /// Its state.
    pub status: ProcessStatus,
    /// Its standard streams.
    pub stdio: StdioPaths,
    /// How it ended, if it did.
    pub exit: Option<Exit>,
}

/// A process of a container as `Pids` lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessEntry {
    /// Its pid.
    pub pid: u32,
    /// The exec it is the first process of.
    pub exec: Option<ExecId>,
}

/// What was deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deleted {
    /// Its pid; 0 for an exec that was never started.
    pub pid: u32,
    /// How it ended; `None` for an exec that was never started.
    pub exit: Option<Exit>,
}

/// What [`Node::cleanup`](super::Node::cleanup) found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cleaned {
    /// There is no such task. If its container exists all the same, its record was lost.
    Unknown,
    /// The id has another bundle by now, or another operation has just removed the task: nothing
    /// was done.
    Replaced,
    /// It was killed if it lived, and removed.
    Removed {
        /// The init.
        pid: u32,
        /// How it ended.
        exit: Exit,
    },
}

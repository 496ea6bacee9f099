//! The documents that a daemon answers with, and that the commands read. Owns their fields, which
//! are version 1 of the protocol; fills none.

use std::time::Duration;

use embedshim_core::exit::Survives;
use serde::{Deserialize, Serialize};

/// The version of all documents here.
pub(crate) const VERSION: u32 = 1;

/// `/v1/status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) version: u32,
    /// What needs attention, a sentence for each thing; empty if all is well.
    pub(crate) problems: Vec<String>,
    pub(crate) daemon: Daemon,
    pub(crate) restarts: Restarts,
    pub(crate) manager: Manager,
    /// `None` while the daemon starts.
    pub(crate) monitor: Option<Monitor>,
    pub(crate) tasks: States,
    pub(crate) execs: States,
    /// `None` if the daemon is no sandbox controller.
    pub(crate) sandboxes: Option<SandboxStates>,
    /// Connections of containerd and launchers.
    pub(crate) connections: usize,
    pub(crate) events: Vec<Events>,
    pub(crate) descriptors: Descriptors,
    pub(crate) runtime_calls: Vec<RuntimeCall>,
    pub(crate) blocked_streams: Vec<BlockedStream>,
}

/// The process that answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Daemon {
    pub(crate) version: String,
    pub(crate) pid: u32,
    pub(crate) phase: Phase,
    pub(crate) uptime_seconds: f64,
    pub(crate) state_dir: String,
    pub(crate) threads: usize,
    /// How long its reactor took to answer; `None` if it did not within a second.
    pub(crate) reactor_seconds: Option<f64>,
}

/// What the daemon does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    /// It takes over what a predecessor has left.
    Starting,
    Serving,
    /// It finishes what is in flight, and then ends.
    Leaving,
}

/// The daemons before this one since the state directory was made, at boot mostly.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Restarts {
    pub(crate) count: u64,
    /// How many of the last daemons ended without being asked to within the last ten minutes.
    pub(crate) recent_failures: usize,
    pub(crate) last: Option<Restart>,
}

/// How the last daemon before this one ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Restart {
    pub(crate) seconds_ago: f64,
    pub(crate) reason: String,
    /// It was asked to end.
    pub(crate) was_asked: bool,
}

/// What stores the daemon's descriptors and starts the next daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Manager {
    Systemd,
    Keeper {
        pid: i32,
    },
    /// Connections end with the daemon.
    None,
}

/// The exit monitor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Monitor {
    pub(crate) backend: String,
    /// What it promises, in words.
    pub(crate) promise: String,
    /// What can be lost while no daemon runs.
    pub(crate) survives: Survives,
    pub(crate) watched: usize,
    pub(crate) capacity: u32,
}

/// Numbers of processes by their state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct States {
    /// Tasks whose `Create` is in flight.
    pub(crate) creating: u64,
    pub(crate) created: u64,
    pub(crate) running: u64,
    pub(crate) pausing: u64,
    pub(crate) paused: u64,
    pub(crate) stopped: u64,
}

/// Numbers of sandboxes by their state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SandboxStates {
    /// Not started yet.
    pub(crate) created: u64,
    pub(crate) ready: u64,
    /// A daemon has died in their stop, which this one finishes.
    #[serde(default)]
    pub(crate) stopping: u64,
    /// Stopped, or without their namespaces; not removed yet.
    pub(crate) stopped: u64,
}

/// What waits for one containerd.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Events {
    /// The path of the socket on which it listens.
    pub(crate) address: String,
    pub(crate) waiting: usize,
    pub(crate) bytes: usize,
    pub(crate) oldest_seconds: Option<f64>,
    /// Since this daemon began.
    pub(crate) acknowledged: u64,
    pub(crate) lost: u64,
}

/// How many descriptors there are, and how many there may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Descriptors {
    /// Entries of the descriptor store.
    pub(crate) stored: usize,
    pub(crate) store_limit: Option<usize>,
    /// Files that this process has open.
    pub(crate) open: Option<u64>,
    pub(crate) open_limit: u64,
}

/// A call of an OCI runtime that is in flight.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RuntimeCall {
    pub(crate) namespace: String,
    pub(crate) id: String,
    pub(crate) operation: String,
    pub(crate) seconds: f64,
}

/// A stream that has bytes, and whose other end has taken none for a second at least.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct BlockedStream {
    pub(crate) namespace: String,
    pub(crate) id: String,
    pub(crate) exec: Option<String>,
    pub(crate) stream: String,
    pub(crate) seconds: f64,
}

/// `/v1/tasks`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Tasks {
    pub(crate) version: u32,
    pub(crate) tasks: Vec<Task>,
}

/// One line of `embedshimd ps`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Task {
    pub(crate) namespace: String,
    pub(crate) id: String,
    /// The init's; 0 as long as there is none.
    pub(crate) pid: u32,
    /// `creating`, or the init's state in containerd's words.
    pub(crate) state: String,
    /// Since the init began.
    pub(crate) age_seconds: Option<f64>,
    /// Execs that were not deleted.
    pub(crate) execs: usize,
    /// As its cgroup counts.
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) oom_kills: u64,
    pub(crate) runtime: String,
    pub(crate) exit_code: Option<u32>,
}

/// `/v1/tasks/NAMESPACE/ID`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TaskDetail {
    pub(crate) version: u32,
    pub(crate) task: Task,
    pub(crate) bundle: String,
    /// The address of the containerd that has created it.
    pub(crate) containerd: String,
    /// The sandbox that it is in, if this daemon is its controller.
    pub(crate) sandbox: Option<String>,
    pub(crate) cgroup: Option<String>,
    pub(crate) init: Process,
    pub(crate) execs: Vec<Process>,
    pub(crate) runtime_calls: Vec<RuntimeCall>,
    /// `None` of a daemon that remembers none.
    pub(crate) history: Option<History>,
}

/// A process of a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Process {
    /// `None` for an init.
    pub(crate) exec: Option<String>,
    pub(crate) pid: u32,
    pub(crate) state: String,
    pub(crate) age_seconds: Option<f64>,
    pub(crate) exit: Option<Exit>,
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
    pub(crate) blocked_streams: Vec<BlockedStream>,
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Exit {
    /// As containerd counts; 255 also stands for unknown.
    pub(crate) code: u32,
    /// In words, which tell 255 from unknown.
    pub(crate) status: Option<String>,
    /// Where it is from: `wait`, `bpf`, `ptrace`, `zombie`, `pidfd_info` or `none`.
    pub(crate) evidence: Option<String>,
    pub(crate) seconds_ago: Option<f64>,
}

/// `/v1/events`: what has happened since this daemon began, the last of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Recent {
    pub(crate) version: u32,
    /// All events since then are here; in seconds since the epoch.
    pub(crate) since: f64,
    /// The number of the next event, for `/v1/events/follow/NUMBER`.
    pub(crate) next: u64,
    pub(crate) events: Vec<Event>,
}

/// What has happened to one task while this daemon ran.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct History {
    /// All events since then are here; in seconds since the epoch.
    pub(crate) since: f64,
    pub(crate) events: Vec<Event>,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Event {
    /// The first of a daemon is 0.
    pub(crate) number: u64,
    /// In seconds since the epoch.
    pub(crate) at: f64,
    /// `create`, `start`, `exit`, `oom`, `delete`, `paused`, `resumed`, `exec-added`,
    /// `exec-started`, `sandbox-started`, `sandbox-stopped`, `sandbox-removed`, or one that a later
    /// version adds.
    pub(crate) kind: String,
    pub(crate) namespace: String,
    /// Of a container or a sandbox.
    pub(crate) id: String,
    pub(crate) exec: Option<String>,
    pub(crate) pid: Option<u32>,
    pub(crate) exit_code: Option<u32>,
}

/// One line of `/v1/events/follow`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum EventLine {
    /// This has happened.
    Event(Event),
    /// The reader was too slow: so many events are missing here.
    Lost { lost: u64 },
    /// Said by the command itself: another daemon tells of events from this time on, in seconds
    /// since the epoch.
    Replaced { daemon_since: f64 },
}

/// `/v1/sandboxes`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SandboxList {
    pub(crate) version: u32,
    /// Whether the daemon is a sandbox controller.
    pub(crate) is_enabled: bool,
    pub(crate) sandboxes: Vec<Sandbox>,
}

/// One line of `embedshimd ps --sandboxes`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sandbox {
    pub(crate) namespace: String,
    pub(crate) id: String,
    /// What tells its pod from all others.
    pub(crate) name: String,
    /// `created`, `ready`, `stopping` or `stopped`.
    pub(crate) state: String,
    /// Since it was created.
    pub(crate) age_seconds: Option<f64>,
    /// Tasks that are in it.
    pub(crate) containers: usize,
    /// 0 after a stop, 255 if it has lost its namespaces.
    pub(crate) exit_code: Option<u32>,
}

/// `/v1/sandboxes/NAMESPACE/ID`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SandboxDetail {
    pub(crate) version: u32,
    pub(crate) sandbox: Sandbox,
    /// Its record; a sandbox that was not started has none.
    pub(crate) record: Option<String>,
    pub(crate) namespaces: Vec<Namespace>,
    /// The files that its containers share.
    pub(crate) mounts: Vec<Mount>,
    /// The ids of the tasks that are in it.
    pub(crate) tasks: Vec<String>,
    /// The pid of the init process of a pod whose containers share their processes.
    #[serde(default)]
    pub(crate) init_pid: Option<i32>,
    pub(crate) ended_seconds_ago: Option<f64>,
}

/// A namespace as the containers of a sandbox have it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Namespace {
    /// `net`, `ipc`, `uts` or `pid`.
    pub(crate) name: String,
    /// `pod`, `container` or `node`.
    pub(crate) owner: String,
    /// Where the pod's is pinned while the sandbox is ready.
    pub(crate) pin: Option<String>,
    /// Whether it is pinned there now.
    pub(crate) is_pinned: Option<bool>,
}

/// A file that the containers of a sandbox share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Mount {
    /// Where it is in a container.
    pub(crate) target: String,
    pub(crate) source: String,
}

/// Seconds as documents have them: to the millisecond.
pub(crate) fn seconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1000.0).round() / 1000.0
}

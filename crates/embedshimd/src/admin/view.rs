//! [`View`]: the daemon as the documents show it. Owns where each field is read; what is read is
//! in memory, in `/proc/self` or a cgroup's counter, and no lock is held for longer than a copy
//! takes.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant, SystemTime};

use embedshim_core::exit::{Backend, Guarantees};
use embedshim_core::id::TaskKey;
use embedshim_core::sandbox::Sandboxes;
use embedshim_core::task::{self, Node, ProcessOverview, ProcessStatus, TaskOverview};
use nix::unistd::getppid;
use shim_api::events::Outboxes;
use shim_api::server::Connections;
use tokio::runtime::Handle;

use super::documents::{
    BlockedStream, Daemon, Descriptors, Events, Exit, Manager, Monitor, Phase, Process,
    RuntimeCall, States, Status, Task, TaskDetail, Tasks, VERSION, seconds,
};
use super::health;
use crate::history::History;
use crate::limits;
use crate::metrics::Metrics;
use crate::service_manager::ServiceManager;
use crate::state_dir::lives::Lives;
use crate::state_dir::lock;

/// How long the reactor may take to answer.
const REACTOR_LIMIT: Duration = Duration::from_secs(1);
/// A stream whose other end takes nothing is blocked after this.
const BLOCKED: Duration = Duration::from_secs(1);

/// The daemon as the documents show it.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) began: Instant,
    pub(crate) state_dir: PathBuf,
    pub(crate) lives: Arc<Lives>,
    pub(crate) manager: Option<Arc<ServiceManager>>,
    /// The pid of the keeper; `None` under systemd.
    pub(crate) keeper: Option<i32>,
    pub(crate) capacity: u32,
    /// What has happened since this daemon began.
    pub(crate) history: Arc<History>,
    pub(crate) reactor: Handle,
    /// Set when the daemon serves.
    pub(crate) serving: OnceLock<Serving>,
    pub(crate) is_leaving: AtomicBool,
}

/// What a daemon that serves has.
#[derive(Debug)]
pub(crate) struct Serving {
    pub(crate) node: Node,
    pub(crate) outboxes: Arc<Outboxes>,
    pub(crate) connections: Connections,
    pub(crate) backend: Backend,
    pub(crate) guarantees: Guarantees,
    pub(crate) metrics: Arc<Metrics>,
    /// If it is a sandbox controller.
    pub(crate) sandboxes: Option<Sandboxes>,
}

impl View {
    /// What is counted; `None` while the daemon starts.
    pub(super) fn metrics(&self) -> Option<&Metrics> {
        Some(&self.serving.get()?.metrics)
    }

    /// `/v1/status`.
    pub(super) fn status(&self) -> Status {
        let serving = self.serving.get();
        let tasks = serving.map_or_else(Vec::new, |serving| serving.node.overview());
        let mut status = Status {
            version: VERSION,
            problems: Vec::new(),
            daemon: self.daemon(),
            restarts: self.lives.restarts(),
            manager: self.manager(),
            monitor: serving.map(|serving| self.monitor(serving)),
            tasks: states(tasks.iter().map(|task| (task.is_complete, &task.init))),
            execs: states(all_execs(&tasks)),
            sandboxes: self.sandbox_states(),
            connections: serving.map_or(0, |serving| serving.connections.count()),
            events: serving.map_or_else(Vec::new, |serving| events(&serving.outboxes)),
            descriptors: self.descriptors(),
            runtime_calls: self.runtime_calls(|_| true),
            blocked_streams: tasks.iter().flat_map(blocked_streams).collect(),
        };
        status.problems = health::problems(&status);
        status
    }

    /// `/v1/tasks`.
    pub(super) fn tasks(&self) -> Tasks {
        let overview = self
            .serving
            .get()
            .map_or_else(Vec::new, |serving| serving.node.overview());
        Tasks {
            version: VERSION,
            tasks: overview.iter().map(|task| self.line(task)).collect(),
        }
    }

    /// `/v1/tasks/NAMESPACE/ID`.
    pub(super) fn task(&self, namespace: &str, id: &str) -> Option<TaskDetail> {
        let key = TaskKey {
            namespace: namespace.parse().ok()?,
            id: id.parse().ok()?,
        };
        let task = self.serving.get()?.node.overview_of(&key)?;
        let process = |process: &ProcessOverview| self::process(&task, process);
        Some(TaskDetail {
            version: VERSION,
            task: self.line(&task),
            bundle: task.bundle.display().to_string(),
            containerd: task.owner.clone(),
            sandbox: task.sandbox.as_ref().map(ToString::to_string),
            cgroup: task.cgroup.as_ref().map(|path| path.display().to_string()),
            init: process(&task.init),
            execs: task.execs.iter().map(process).collect(),
            runtime_calls: self.runtime_calls(|call| call.task == key),
            history: Some(self.history.of_task(namespace, id)),
        })
    }

    fn line(&self, task: &TaskOverview) -> Task {
        let node = self.serving.get().map(|serving| &serving.node);
        Task {
            namespace: task.key.namespace.to_string(),
            id: task.key.id.to_string(),
            pid: task.init.pid,
            state: state(task, &task.init),
            age_seconds: task.init.age.map(seconds),
            execs: task.execs.len(),
            memory_bytes: node.and_then(|node| node.memory_used(&task.key)),
            oom_kills: task.oom_kills,
            runtime: task.runtime.clone(),
            exit_code: task.init.exit.map(|exit| exit.code),
        }
    }

    fn daemon(&self) -> Daemon {
        let phase = match (self.serving.get(), self.is_leaving.load(Ordering::Acquire)) {
            (_, true) => Phase::Leaving,
            (Some(_), false) => Phase::Serving,
            (None, false) => Phase::Starting,
        };
        Daemon {
            version: lock::VERSION.to_owned(),
            pid: std::process::id(),
            phase,
            uptime_seconds: seconds(self.began.elapsed()),
            state_dir: self.state_dir.display().to_string(),
            threads: std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count),
            reactor_seconds: self.ask_reactor().map(|time| time.as_secs_f64()),
        }
    }

    /// How long the reactor takes to run a task.
    fn ask_reactor(&self) -> Option<Duration> {
        let (sender, receiver) = mpsc::channel();
        let began = Instant::now();
        self.reactor.spawn(async move { sender.send(()) });
        receiver.recv_timeout(REACTOR_LIMIT).ok()?;
        Some(began.elapsed())
    }

    fn manager(&self) -> Manager {
        match (&self.manager, self.keeper) {
            (Some(_), None) => Manager::Systemd,
            // Another parent than the keeper has a process whose keeper has ended.
            (Some(_), Some(pid)) if getppid().as_raw() == pid => Manager::Keeper { pid },
            _ => Manager::None,
        }
    }

    fn monitor(&self, serving: &Serving) -> Monitor {
        Monitor {
            backend: serving.backend.to_string(),
            promise: serving.guarantees.to_string(),
            survives: serving.guarantees.survives,
            watched: serving.node.watched(),
            capacity: self.capacity,
        }
    }

    fn descriptors(&self) -> Descriptors {
        let stored = self.manager.as_ref().map(|manager| manager.stored());
        let (stored, store_limit) = stored.unwrap_or_default();
        let open = limits::count_open_files();
        Descriptors {
            stored,
            store_limit,
            open: open.map(|count| count.open),
            open_limit: limits::max_open_files(),
        }
    }

    fn runtime_calls(&self, of: impl Fn(&task::RuntimeCall) -> bool) -> Vec<RuntimeCall> {
        let Some(serving) = self.serving.get() else {
            return Vec::new();
        };
        let calls = serving.node.runtime_calls().into_iter().filter(of);
        let shown = calls.map(|call| RuntimeCall {
            namespace: call.task.namespace.to_string(),
            id: call.task.id.to_string(),
            operation: call.operation.to_owned(),
            seconds: seconds(call.since.elapsed()),
        });
        shown.collect()
    }
}

fn events(outboxes: &Outboxes) -> Vec<Events> {
    let now = SystemTime::now();
    let backlogs = outboxes.backlogs().into_iter();
    let shown = backlogs.map(|backlog| Events {
        address: backlog.address,
        waiting: backlog.events,
        bytes: backlog.bytes,
        oldest_seconds: backlog
            .oldest
            .map(|oldest| seconds(now.duration_since(oldest).unwrap_or_default())),
        acknowledged: backlog.acknowledged,
        lost: backlog.lost,
    });
    shown.collect()
}

fn all_execs(tasks: &[TaskOverview]) -> impl Iterator<Item = (bool, &ProcessOverview)> {
    let execs = tasks.iter().flat_map(|task| &task.execs);
    execs.map(|exec| (true, exec))
}

fn states<'a>(processes: impl Iterator<Item = (bool, &'a ProcessOverview)>) -> States {
    let mut states = States::default();
    for (is_complete, process) in processes {
        let count = match process.status {
            _ if !is_complete => &mut states.creating,
            ProcessStatus::Created => &mut states.created,
            ProcessStatus::Running => &mut states.running,
            ProcessStatus::Pausing => &mut states.pausing,
            ProcessStatus::Paused => &mut states.paused,
            ProcessStatus::Stopped => &mut states.stopped,
        };
        *count += 1;
    }
    states
}

fn state(task: &TaskOverview, process: &ProcessOverview) -> String {
    let word = match process.status {
        _ if !task.is_complete => "creating",
        ProcessStatus::Created => "created",
        ProcessStatus::Running => "running",
        ProcessStatus::Pausing => "pausing",
        ProcessStatus::Paused => "paused",
        ProcessStatus::Stopped => "stopped",
    };
    word.to_owned()
}

fn process(task: &TaskOverview, process: &ProcessOverview) -> Process {
    let stdio = &process.stdio;
    Process {
        exec: process.exec.as_ref().map(ToString::to_string),
        pid: process.pid,
        state: state(task, process),
        age_seconds: process.age.map(seconds),
        exit: process.exit.as_ref().map(exit),
        stdin: stdio.stdin.clone(),
        stdout: stdio.stdout.clone(),
        stderr: stdio.stderr.clone(),
        terminal: stdio.terminal,
        blocked_streams: blocked_of(task, process).collect(),
    }
}

fn exit(exit: &task::Exit) -> Exit {
    let evidence = exit.evidence.map(serde_json::to_value);
    let evidence = evidence.and_then(|value| Some(value.ok()?.as_str()?.to_owned()));
    let ago = SystemTime::now().duration_since(exit.at).ok();
    Exit {
        code: exit.code,
        status: exit.status.map(|status| status.to_string()),
        evidence,
        seconds_ago: ago.map(seconds),
    }
}

fn blocked_streams(task: &TaskOverview) -> impl Iterator<Item = BlockedStream> {
    let processes = [&task.init].into_iter().chain(&task.execs);
    processes.flat_map(|process| blocked_of(task, process))
}

fn blocked_of(
    task: &TaskOverview,
    process: &ProcessOverview,
) -> impl Iterator<Item = BlockedStream> {
    let blocked = process
        .blocked
        .iter()
        .filter(|stream| stream.time >= BLOCKED);
    blocked.map(|stream| BlockedStream {
        namespace: task.key.namespace.to_string(),
        id: task.key.id.to_string(),
        exec: process.exec.as_ref().map(ToString::to_string),
        stream: stream.stream.to_owned(),
        seconds: seconds(stream.time),
    })
}

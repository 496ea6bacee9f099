//! [`Node`]: the tasks of one machine and every operation on them. Owns the background work and
//! what reads answer; each mutation is the engine's, in a task that outlives its caller.

use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, mpsc};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tracing::warn;

use crate::blocking::blocking;
use crate::bundle::BundleId;
use crate::cgroup::{Metrics, OomWatcher};
use crate::error::Error;
use crate::event::Event;
use crate::exit::ExitMonitor;
use crate::fdstore::InheritedFds;
use crate::id::{ProcessKey, TaskKey};
use crate::reaper::Awaited;
use crate::runtime::RuntimeCall;
use crate::stdio::{Idle, StdioError};
use crate::task::api::{
    CheckpointTask, Cleaned, CreateTask, Deleted, ExecProcess, Exit, ProcessEntry, ProcessSnapshot,
    ProcessStatus,
};
use crate::task::config::NodeConfig;
use crate::task::context::RequestContext;
use crate::task::engine::Engine;
use crate::task::exits::current_metrics;
use crate::task::lifecycle::Phase;
use crate::task::overview::TaskOverview;
use crate::task::store::{Store, boot_id};

/// How long a read may take to look into a cgroup (invariant 6): the threads for such work can be
/// taken by mounts that hang, and containerd waits 2 s for an answer. Without the look, what is
/// known answers.
const READ_LIMIT: Duration = Duration::from_secs(1);
/// How long the statistics of a running container may take, since nothing is known of them yet.
const STATS_LIMIT: Duration = Duration::from_secs(10);

/// The tasks of one machine.
///
/// One state directory has one node at a time, and an [`ExitMonitor`] serves one node: both are for
/// the caller to see to, as by a lock. Several nodes in one process do not know of each other.
///
/// Mutations run in tasks of their own: dropping the returned future abandons the answer, never the
/// work. Reads answer from the last published state and never wait for the OCI runtime.
#[derive(Clone, Debug)]
pub struct Node {
    engine: Arc<Engine>,
    context: RequestContext,
    events: Arc<Mutex<mpsc::UnboundedReceiver<Event>>>,
    _background: Arc<Background>,
}

/// What runs as long as the node is used.
#[derive(Debug)]
struct Background(Vec<AbortHandle>);

impl Background {
    fn run(&mut self, work: impl Future<Output = ()> + Send + 'static) {
        self.0.push(tokio::spawn(work).abort_handle());
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

impl Node {
    /// Takes over what is in the state directory and starts to work. Needs a tokio runtime.
    ///
    /// What a predecessor has left half done is finished or undone; each operation on such a task
    /// waits for that.
    ///
    /// Where the monitor is not sure of others' children, the program should inherit the
    /// containers' processes, as a child subreaper (`PR_SET_CHILD_SUBREAPER`, and
    /// [`NodeConfig::reap_orphans`]). Dropping the last clone of a node ends its work; the
    /// containers run on, for the next one that is opened on the state directory.
    pub async fn open(config: NodeConfig, monitor: Arc<dyn ExitMonitor>) -> Result<Self, Error> {
        Self::take_over(config, monitor, &mut InheritedFds::default()).await
    }

    /// The same with the descriptors that a predecessor's store gave back; what belongs to a task
    /// is taken out.
    pub async fn take_over(
        config: NodeConfig,
        monitor: Arc<dyn ExitMonitor>,
        inherited: &mut InheritedFds,
    ) -> Result<Self, Error> {
        let state_dir = config.state_dir.clone();
        let (store, boot_id) =
            blocking(move || Ok::<_, Error>((Store::open(&state_dir)?, boot_id()))).await??;
        let oom = OomWatcher::new().map_err(|source| Error::Path {
            doing: "cannot watch for OOM kills in",
            path: "/sys/fs/cgroup".into(),
            source,
        })?;
        let idle = Idle::new().map_err(|source| StdioError::Wait { source })?;
        let (sender, receiver) = mpsc::unbounded_channel();
        let engine = Engine::new(config, boot_id, store, monitor, oom, idle, sender);
        let engine = Arc::new(engine);
        // What is taken over may wait for streams.
        let mut background = Background(Vec::new());
        background.run(engine.idle.clone().serve());
        engine.recover(inherited).await?;
        background.run(Arc::clone(&engine).dispatch_exits());
        background.run(Arc::clone(&engine).watch_oom());
        if engine.config.reap_orphans {
            let (reaper, watched) = (engine.reaper.clone(), Arc::clone(&engine));
            background.run(reaper.reap(move |pid| watched.registry.is_tracked(pid)));
        }
        Ok(Self {
            engine,
            context: RequestContext::default(),
            events: Arc::new(Mutex::new(receiver)),
            _background: Arc::new(background),
        })
    }

    /// The same node, whose operations are done for this request.
    pub fn with_context(&self, context: RequestContext) -> Self {
        Self {
            context,
            ..self.clone()
        }
    }

    /// Waits until no operation is under way that changes anything.
    pub async fn quiet(&self) {
        self.engine.quiet().await;
    }

    /// Writes all records again, after their directory was removed.
    pub async fn recreate_records(&self) -> Result<(), Error> {
        let store = self.engine.store.clone();
        blocking(move || store.make()).await??;
        for task in self.engine.registry.all() {
            self.engine.save(&task).await?;
        }
        Ok(())
    }

    /// Mounts the rootfs, runs `runc create`, watches the init. Returns its pid.
    pub async fn create(&self, request: CreateTask) -> Result<u32, Error> {
        self.detached(self.engine().create(request, self.context()))
            .await
    }

    /// Starts the init or an exec. Returns its pid.
    pub async fn start(&self, key: &ProcessKey) -> Result<u32, Error> {
        self.detached(self.engine().start(key.clone(), self.context()))
            .await
    }

    /// Declares an exec; [`start`](Self::start) runs it.
    pub async fn exec(&self, request: ExecProcess) -> Result<(), Error> {
        self.detached(self.engine().exec(request, self.context()))
            .await
    }

    /// Deletes a stopped (or never started) process; with the init, the whole task.
    pub async fn delete(&self, key: &ProcessKey) -> Result<Deleted, Error> {
        self.detached(self.engine().delete(key.clone(), self.context()))
            .await
    }

    /// Sends a signal to one process, or with `all` to all of the container.
    pub async fn kill(&self, key: &ProcessKey, signal: u32, all: bool) -> Result<(), Error> {
        let is_replay = self.context.is_replay;
        self.detached(self.engine().kill(key.clone(), signal, all, is_replay))
            .await
    }

    /// Freezes the container.
    pub async fn pause(&self, key: &TaskKey) -> Result<(), Error> {
        let is_replay = self.context.is_replay;
        self.detached(self.engine().pause(key.clone(), is_replay))
            .await
    }

    /// Thaws it.
    pub async fn resume(&self, key: &TaskKey) -> Result<(), Error> {
        let is_replay = self.context.is_replay;
        self.detached(self.engine().resume(key.clone(), is_replay))
            .await
    }

    /// Changes resources; `resources` is an OCI `LinuxResources` as JSON.
    pub async fn update(&self, key: &TaskKey, resources: Vec<u8>) -> Result<(), Error> {
        self.detached(self.engine().update(key.clone(), resources))
            .await
    }

    /// Writes the container's state to files from which [`CreateTask::checkpoint`] restores it.
    pub async fn checkpoint(&self, key: &TaskKey, request: CheckpointTask) -> Result<(), Error> {
        let is_replay = self.context.is_replay;
        self.detached(self.engine().checkpoint(key.clone(), request, is_replay))
            .await
    }

    /// Starts a program whose end the caller waits for, which a node that reaps orphans
    /// ([`NodeConfig::reap_orphans`]) would otherwise take for one. Blocks.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Awaited> {
        self.engine.reaper.spawn(command)
    }

    /// containerd has given this bundle up: kills what lives, removes everything. Waits for
    /// operations under way.
    pub async fn cleanup(&self, key: &TaskKey, bundle: &Path) -> Result<Cleaned, Error> {
        self.detached(self.engine().cleanup(key.clone(), bundle.to_owned()))
            .await
    }

    /// Kills and removes every task of a sandbox whose bundle is gone: its client has given it up,
    /// and has no other way to say so. To be called now and then.
    pub async fn clean_up_abandoned(&self) {
        for task in self.engine.registry.all() {
            let id = task.id().to_owned();
            if task.sandbox.is_some()
                && let Err(error) = self
                    .detached(self.engine().clean_up_if_abandoned(task))
                    .await
            {
                warn!(id, %error, "cannot clean up a task whose bundle is gone");
            }
        }
    }

    /// Closes our end of a process's standard input: it sees the end once the client's ends are
    /// closed too.
    pub async fn close_stdin(&self, key: &ProcessKey) -> Result<(), Error> {
        let (task, process) = self.engine.registry.process(key)?;
        process.close_stdin();
        let engine = self.engine();
        self.detached(async move { engine.save(&task).await.map(drop) })
            .await
    }

    /// Resizes the terminal, if there is one.
    pub fn resize_pty(&self, key: &ProcessKey, width: u16, height: u16) -> Result<(), Error> {
        let (_, process) = self.engine.registry.process(key)?;
        if process.exec.is_some() && process.now().phase() == Phase::Stopped {
            return Err(Error::WrongState("cannot resize a stopped container"));
        }
        match process.streams() {
            Some(streams) => Ok(streams.resize(width, height)?),
            None => Ok(()),
        }
    }

    /// Waits for the end of the process that has this key now. What waits holds nothing else: there
    /// is one for each container, for as long as that lives.
    pub fn wait(
        &self,
        key: &ProcessKey,
    ) -> impl Future<Output = Result<Exit, Error>> + Send + use<> {
        let found = self.engine.registry.process(key);
        let process = found.map(|(_, process)| process);
        async move { process?.ended().await }
    }

    /// The process at this moment.
    pub fn state(&self, key: &ProcessKey) -> Result<ProcessSnapshot, Error> {
        let (task, process) = self.engine.registry.process(key)?;
        let now = process.now();
        // An exec shows its container's freezing as its own state, as runc-v2 does.
        let frozen = task.init.now().phase().status();
        let status = match frozen {
            ProcessStatus::Paused | ProcessStatus::Pausing => frozen,
            _ => now.phase().status(),
        };
        Ok(ProcessSnapshot {
            key: key.clone(),
            bundle: task.bundle.path.clone(),
            pid: now.pid,
            status,
            stdio: process.stdio.clone(),
            exit: now.exit(),
        })
    }

    /// Which bundle a task was created from, or is being; `None` for a task there is not.
    pub fn bundle_id(&self, key: &TaskKey) -> Option<BundleId> {
        let task = self.engine.registry.task_even_unfinished(key)?;
        Some(task.bundle.id())
    }

    /// The init's pid, 0 for a task there is not.
    pub fn init_pid(&self, key: &TaskKey) -> u32 {
        self.engine
            .registry
            .task(key)
            .map_or(0, |task| task.init.now().pid)
    }

    /// The container's processes. Never empty for a task there is (invariant 8): containerd 1.7
    /// takes that for a leak and destroys the task, with its exit code.
    pub async fn pids(&self, key: &TaskKey) -> Result<Vec<ProcessEntry>, Error> {
        let task = self.engine.registry.task(key)?;
        let init = task.init.now();
        let mut entries = Vec::new();
        if init.phase() != Phase::Stopped
            && let Some(cgroup) = task.cgroup()
            && let Ok(Ok(Ok(pids))) = timeout(READ_LIMIT, blocking(move || cgroup.pids())).await
        {
            let execs = task.all_execs();
            entries.extend(
                pids.into_iter()
                    .filter_map(|pid| u32::try_from(pid).ok())
                    .map(|pid| {
                        let root = execs.iter().find(|exec| exec.now().pid == pid);
                        ProcessEntry {
                            pid,
                            exec: root.and_then(|process| process.exec.clone()),
                        }
                    }),
            );
        }
        if entries.is_empty() {
            entries.push(ProcessEntry {
                pid: init.pid,
                exec: None,
            });
        }
        Ok(entries)
    }

    /// The cgroup's counters; of a stopped task, the last ones read.
    pub async fn stats(&self, key: &TaskKey) -> Result<Metrics, Error> {
        let task = self.engine.registry.task(key)?;
        let limit = match task.last_metrics() {
            Some(_) => READ_LIMIT,
            None => STATS_LIMIT,
        };
        match current_metrics(&task, limit).await {
            Ok(Some(metrics)) if task.init.now().phase() != Phase::Stopped => Ok(metrics),
            Ok(now) => task.last_metrics().or(now).ok_or(Error::NoCgroup),
            Err(late) => task.last_metrics().ok_or(late),
        }
    }

    /// All tasks at this moment, those that are being created included, by name. Reads what is in
    /// memory; may be called from any thread, and waits for nothing.
    pub fn overview(&self) -> Vec<TaskOverview> {
        let tasks = self.engine.registry.all_even_unfinished();
        let mut all: Vec<_> = tasks.iter().map(|task| TaskOverview::of(task)).collect();
        all.sort_by(|one, other| one.key.cmp(&other.key));
        all
    }

    /// One task at this moment, also while it is being created.
    pub fn overview_of(&self, key: &TaskKey) -> Option<TaskOverview> {
        let task = self.engine.registry.task_even_unfinished(key)?;
        Some(TaskOverview::of(&task))
    }

    /// How much memory the task's processes use, as its cgroup counts it. Blocks on the cgroup file
    /// system.
    pub fn memory_used(&self, key: &TaskKey) -> Option<u64> {
        let task = self.engine.registry.task_even_unfinished(key)?;
        task.cgroup()?.memory_used()
    }

    /// The calls of OCI runtimes that are in flight, the oldest first.
    pub fn runtime_calls(&self) -> Vec<RuntimeCall> {
        self.engine.calls.all()
    }

    /// How many tasks there are, those that are being created included.
    pub fn task_count(&self) -> usize {
        self.engine.registry.count()
    }

    /// How many processes are watched.
    pub fn watched(&self) -> usize {
        self.engine.registry.tracked_count()
    }

    /// The next event, in order. Never answers if [`NodeConfig::events`] has a sink. Meant for one
    /// consumer; with several, each event goes to one of them.
    pub async fn next_event(&self) -> Option<Event> {
        self.events.lock().await.recv().await
    }

    async fn detached<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        self.engine.detached(work).await
    }

    fn context(&self) -> RequestContext {
        self.context.clone()
    }

    fn engine(&self) -> Arc<Engine> {
        Arc::clone(&self.engine)
    }
}

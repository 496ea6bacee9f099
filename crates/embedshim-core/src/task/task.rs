//! [`Task`]: one container in execution, with its processes, its cgroup and the order of its exits.
//! Owns what must be remembered about it ([`Task::save`]); the operations on it live in the sibling
//! modules.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::cgroup::{Cgroup, Metrics};
use crate::error::Error;
use crate::event::EventKind;
use crate::fdstore::ProcessFds;
use crate::id::{ExecId, TaskKey};
use crate::rootfs::Mount;
use crate::runtime::Runtime;
use crate::task::api::{CreateTask, RuntimeOptions};
use crate::task::context::RequestId;
use crate::task::detached::blocking;
use crate::task::engine::Shared;
use crate::task::process::TaskProcess;
use crate::task::store::{Bundle, TaskRecord, VERSION};

/// Numbers tasks for the OOM watcher.
static SERIAL: AtomicU64 = AtomicU64::new(1);

/// One container in execution.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) key: TaskKey,
    pub(crate) serial: u64,
    pub(crate) bundle: Bundle,
    pub(crate) owner: String,
    pub(crate) rootfs: Vec<Mount>,
    pub(crate) runtime: Runtime,
    /// The image that `Start` restores: until then the container does not exist.
    pub(crate) checkpoint: Option<PathBuf>,
    /// The kernel ends all its processes with the init; in a shared pid namespace we have to.
    pub(crate) has_own_pid_namespace: bool,
    pub(crate) init: Arc<TaskProcess>,
    options: RuntimeOptions,
    execs: Mutex<BTreeMap<ExecId, Arc<TaskProcess>>>,
    facts: Mutex<Facts>,
    order: Mutex<ExitOrder>,
    /// The init's exit event is out, the last of its container.
    exit_told: watch::Sender<bool>,
    complete: AtomicBool,
    silent: AtomicBool,
    /// A predecessor died within its creation: whether it is taken over or removed is not decided.
    is_half_created: AtomicBool,
    settled: watch::Sender<bool>,
    saving: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Facts {
    cgroup: Option<Cgroup>,
    oom_kills: u64,
    last_metrics: Option<Metrics>,
    unknown: serde_json::Map<String, serde_json::Value>,
}

/// The init's exit is the last of its container (892dc54bd, 421a4b568 in containerd).
#[derive(Debug, Default)]
struct ExitOrder {
    init_ended: bool,
    running_execs: usize,
    held: Option<EventKind>,
}

impl Task {
    /// A task that is to be created.
    pub(crate) fn new(
        request: CreateTask,
        bundle: Bundle,
        runtime: Runtime,
        has_own_pid_namespace: bool,
        made_by: Option<RequestId>,
        fds: ProcessFds,
    ) -> Self {
        let CreateTask {
            key,
            rootfs,
            stdio,
            runtime: options,
            owner,
            checkpoint,
            ..
        } = request;
        let init = TaskProcess::new(None, stdio, None, made_by, fds);
        let task = Self::with(
            key,
            bundle,
            owner,
            rootfs,
            options,
            runtime,
            has_own_pid_namespace,
            init,
        );
        Self { checkpoint, ..task }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "private: the two constructors' common part"
    )]
    fn with(
        key: TaskKey,
        bundle: Bundle,
        owner: String,
        rootfs: Vec<Mount>,
        options: RuntimeOptions,
        runtime: Runtime,
        has_own_pid_namespace: bool,
        init: TaskProcess,
    ) -> Self {
        Self {
            key,
            serial: SERIAL.fetch_add(1, Ordering::Relaxed),
            bundle,
            owner,
            rootfs,
            runtime,
            checkpoint: None,
            has_own_pid_namespace,
            init: Arc::new(init),
            options,
            execs: Mutex::default(),
            facts: Mutex::default(),
            order: Mutex::default(),
            exit_told: watch::Sender::new(false),
            complete: AtomicBool::new(false),
            silent: AtomicBool::new(false),
            is_half_created: AtomicBool::new(false),
            settled: watch::Sender::new(false),
            saving: tokio::sync::Mutex::default(),
        }
    }

    /// A task as it was remembered. Its processes are not watched yet.
    pub(crate) fn restored(
        record: TaskRecord,
        runtime: Runtime,
        has_own_pid_namespace: bool,
        fds: impl Fn(u64) -> ProcessFds,
    ) -> Self {
        let key = TaskKey {
            namespace: record.namespace,
            id: record.id,
        };
        let own = fds(record.init.number);
        let init = TaskProcess::restored(None, record.init, own);
        let task = Self::with(
            key,
            record.bundle,
            record.owner,
            record.rootfs,
            record.runtime,
            runtime,
            has_own_pid_namespace,
            init,
        );
        task.complete.store(record.complete, Ordering::Relaxed);
        *task.facts() = Facts {
            cgroup: record.cgroup,
            oom_kills: record.oom_kills,
            last_metrics: record.last_metrics,
            unknown: record.unknown,
        };
        *task.execs() = record
            .execs
            .into_iter()
            .map(|(id, exec)| {
                let own = fds(exec.number);
                (
                    id.clone(),
                    Arc::new(TaskProcess::restored(Some(id), exec, own)),
                )
            })
            .collect();
        Self {
            checkpoint: record.checkpoint,
            ..task
        }
    }

    /// What there is to remember.
    fn record(&self, boot_id: &str) -> TaskRecord {
        let facts = self.facts();
        TaskRecord {
            version: VERSION,
            boot_id: boot_id.to_owned(),
            namespace: self.key.namespace.clone(),
            id: self.key.id.clone(),
            bundle: self.bundle.clone(),
            owner: self.owner.clone(),
            runtime: self.options.clone(),
            checkpoint: self.checkpoint.clone(),
            rootfs: self.rootfs.clone(),
            complete: self.is_complete(),
            init: self.init.record(),
            execs: self
                .execs()
                .iter()
                .map(|(id, exec)| (id.clone(), exec.record()))
                .collect(),
            cgroup: facts.cgroup.clone(),
            oom_kills: facts.oom_kills,
            last_metrics: facts.last_metrics.clone(),
            unknown: facts.unknown.clone(),
        }
    }

    /// Writes down what there is to remember. The lock keeps an older picture from replacing a
    /// newer one.
    pub(crate) async fn save(&self, shared: &Shared) -> Result<(), Error> {
        let _turn = self.saving.lock().await;
        let (store, record) = (shared.store.clone(), self.record(&shared.boot_id));
        blocking(move || store.save(&record)).await?
    }

    /// The container's id.
    pub(crate) fn id(&self) -> &str {
        self.key.id.as_str()
    }

    /// The runtime's log of calls that wait for the init's turn, so one at a time.
    pub(crate) fn log(&self) -> PathBuf {
        self.bundle.path.join("log.json")
    }

    /// The log of one call that does not wait for that: several run at a time, and each has to find
    /// its own words.
    pub(crate) fn own_log(&self) -> PathBuf {
        let number = SERIAL.fetch_add(1, Ordering::Relaxed);
        self.bundle.path.join(format!(".call-{number}.log.json"))
    }

    /// Where the runtime writes the init's pid.
    pub(crate) fn pid_file(&self) -> PathBuf {
        self.bundle.path.join("init.pid")
    }

    /// Where the root filesystem is mounted.
    pub(crate) fn rootfs_path(&self) -> PathBuf {
        self.bundle.path.join("rootfs")
    }

    /// The owner of standard streams, if the request names one.
    pub(crate) fn io_owner(&self) -> Option<(u32, u32)> {
        let owner = (self.options.io_uid, self.options.io_gid);
        (owner != (0, 0)).then_some(owner)
    }

    /// `create` came to its end: the task may be seen.
    pub(crate) fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// It may be seen from now on.
    pub(crate) fn completed(&self) {
        self.complete.store(true, Ordering::Release);
    }

    /// It may not be seen after all.
    pub(crate) fn uncompleted(&self) {
        self.complete.store(false, Ordering::Release);
    }

    /// Its creation was cut short. Who wants its id has to wait for what becomes of it.
    pub(crate) fn is_to_be_settled(&self) {
        self.is_half_created.store(true, Ordering::Release);
    }

    /// Whether it will be known soon if its id is free.
    pub(crate) fn is_half_created(&self) -> bool {
        self.is_half_created.load(Ordering::Acquire)
    }

    /// It is a task, or its id is free.
    pub(crate) fn was_settled(&self) {
        self.is_half_created.store(false, Ordering::Release);
        self.settled.send_replace(true);
    }

    /// Waits until it is a task or its id is free.
    pub(crate) async fn until_settled(&self) {
        // The sender is a field of this task: it cannot be gone.
        let mut settled = self.settled.subscribe();
        let _ = settled.wait_for(|settled| *settled).await;
    }

    /// Nobody wants to hear of it any more: whoever gave it up tells its end himself.
    pub(crate) fn silence(&self) {
        self.silent.store(true, Ordering::Release);
    }

    /// Whether somebody wants to hear of it.
    pub(crate) fn is_silent(&self) -> bool {
        self.silent.load(Ordering::Acquire)
    }

    /// The process of that name.
    pub(crate) fn find(&self, exec: Option<&ExecId>) -> Result<Arc<TaskProcess>, Error> {
        match exec {
            None => Ok(Arc::clone(&self.init)),
            Some(id) => self
                .execs()
                .get(id)
                .cloned()
                .ok_or_else(|| Error::NoSuchProcess { id: id.to_string() }),
        }
    }

    /// All execs.
    pub(crate) fn all_execs(&self) -> Vec<Arc<TaskProcess>> {
        self.execs().values().cloned().collect()
    }

    /// The numbers of its processes, as far as they are known, and how many execs are being started
    /// that have none yet.
    pub(crate) fn known_pids(&self) -> (Vec<i32>, usize) {
        let execs = self.all_execs();
        let all = execs.iter().chain([&self.init]);
        let known = all.filter_map(|process| Some(process.identity()?.pid));
        let starting = execs
            .iter()
            .filter(|exec| exec.start_mark().is_some() && exec.identity().is_none());
        (known.collect(), starting.count())
    }

    /// Adds an exec; of several with one name exactly one wins (1a8df3f23).
    pub(crate) fn add_exec(&self, id: ExecId, exec: TaskProcess) -> Result<(), Error> {
        match self.execs().entry(id) {
            Entry::Occupied(taken) => Err(Error::IdTaken {
                id: taken.key().to_string(),
            }),
            Entry::Vacant(free) => {
                free.insert(Arc::new(exec));
                Ok(())
            }
        }
    }

    /// Removes an exec.
    pub(crate) fn remove_exec(&self, id: &ExecId) {
        self.execs().remove(id);
    }

    /// Refuses an exec's start once the init has ended.
    pub(crate) fn admit_exec_start(&self) -> Result<(), Error> {
        self.check_init(&self.order())
    }

    fn check_init(&self, order: &ExitOrder) -> Result<(), Error> {
        if order.init_ended {
            return Err(Error::InitNotRunning {
                id: self.id().to_owned(),
            });
        }
        Ok(())
    }

    /// Counts an exec as running, unless the init has ended (e7357916b).
    pub(crate) fn enter_exec(&self) -> Result<(), Error> {
        let mut order = self.order();
        self.check_init(&order)?;
        order.running_execs += 1;
        Ok(())
    }

    /// An exec does not run any more. Emits the init's exit if it was held for this one.
    pub(crate) fn leave_exec(&self, shared: &Shared) {
        let mut order = self.order();
        order.running_execs = order.running_execs.saturating_sub(1);
        if order.running_execs == 0
            && let Some(exit) = order.held.take()
        {
            self.tell_exit(shared, exit);
        }
    }

    /// No exec is started from here on.
    pub(crate) fn init_ended(&self) {
        self.order().init_ended = true;
    }

    /// Emits the init's exit as soon as no exec runs.
    pub(crate) fn tell_init_exit(&self, shared: &Shared, exit: EventKind) {
        let mut order = self.order();
        if order.running_execs == 0 {
            self.tell_exit(shared, exit);
        } else {
            order.held = Some(exit);
        }
    }

    fn tell_exit(&self, shared: &Shared, exit: EventKind) {
        shared.emit(self, exit);
        self.exit_told.send_replace(true);
    }

    /// Waits until the init's exit event is out.
    pub(crate) async fn exit_told(&self) {
        // The sender is a field of ours: it cannot be gone.
        let _ = self.exit_told.subscribe().wait_for(|told| *told).await;
    }

    /// Its cgroup, once it is known.
    pub(crate) fn cgroup(&self) -> Option<Cgroup> {
        self.facts().cgroup.clone()
    }

    /// Learns its cgroup.
    pub(crate) fn set_cgroup(&self, cgroup: Option<Cgroup>) {
        self.facts().cgroup = cgroup;
    }

    /// Notes the kernel's count of OOM kills; true if it grew.
    pub(crate) fn count_oom_kills(&self, kills: u64) -> bool {
        let mut facts = self.facts();
        let grew = kills > facts.oom_kills;
        facts.oom_kills = facts.oom_kills.max(kills);
        grew
    }

    /// The last reading of its counters.
    pub(crate) fn last_metrics(&self) -> Option<Metrics> {
        self.facts().last_metrics.clone()
    }

    /// Keeps a reading for when the cgroup is gone.
    pub(crate) fn keep_metrics(&self, metrics: Metrics) {
        self.facts().last_metrics = Some(metrics);
    }

    fn execs(&self) -> MutexGuard<'_, BTreeMap<ExecId, Arc<TaskProcess>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self) -> MutexGuard<'_, ExitOrder> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

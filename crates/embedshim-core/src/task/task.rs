//! [`Task`]: one container in execution, with its processes, its cgroup and the order of its exits.
//! Owns what there is to record of it; never writes it, never emits an event, and gives the events
//! that become due to its caller.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};

use crate::bundle::Bundle;
use crate::cgroup::{Cgroup, Metrics};
use crate::error::Error;
use crate::event::EventKind;
use crate::fdstore::ProcessFds;
use crate::id::{ExecId, SandboxId, TaskKey};
use crate::rootfs::Mount;
use crate::runtime::{Runtime, RuntimeOptions};
use crate::spec::Traits;
use crate::task::api::CreateTask;
use crate::task::context::RequestId;
use crate::task::exit_order::ExitOrder;
use crate::task::process::TaskProcess;
use crate::task::record::{TaskRecord, VERSION};
use crate::task::standing::{Recording, Stage, Standing};

/// Numbers tasks for the OOM watcher.
static SERIAL: AtomicU64 = AtomicU64::new(1);

/// One container in execution.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) key: TaskKey,
    pub(crate) serial: u64,
    pub(crate) bundle: Bundle,
    pub(crate) owner: String,
    /// Its client has no clean-up for it but the removal of its bundle.
    pub(crate) sandbox: Option<SandboxId>,
    pub(crate) rootfs: Vec<Mount>,
    pub(crate) runtime: Runtime,
    /// The image that `Start` restores: until then the container does not exist.
    pub(crate) checkpoint: Option<PathBuf>,
    /// What its spec says.
    pub(crate) traits: Traits,
    pub(crate) init: Arc<TaskProcess>,
    options: RuntimeOptions,
    execs: Mutex<BTreeMap<ExecId, Arc<TaskProcess>>>,
    facts: Mutex<Facts>,
    order: Mutex<ExitOrder>,
    /// The order of exits has come to its end.
    emitted: Notify,
    standing: watch::Sender<Standing>,
    recording: tokio::sync::Mutex<Recording>,
}

#[derive(Debug, Default)]
struct Facts {
    cgroup: Option<Cgroup>,
    oom_kills: u64,
    last_metrics: Option<Metrics>,
    is_checkpointing: bool,
    unknown: serde_json::Map<String, serde_json::Value>,
}

impl Task {
    /// A task that is to be created.
    pub(crate) fn new(
        request: CreateTask,
        bundle: Bundle,
        runtime: Runtime,
        traits: Traits,
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
            sandbox,
            ..
        } = request;
        let init = TaskProcess::new(None, stdio, None, made_by, fds);
        let task = Self::with(key, bundle, owner, rootfs, options, runtime, traits, init);
        Self {
            sandbox,
            checkpoint,
            ..task
        }
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
        traits: Traits,
        init: TaskProcess,
    ) -> Self {
        Self {
            key,
            serial: SERIAL.fetch_add(1, Ordering::Relaxed),
            bundle,
            owner,
            sandbox: None,
            rootfs,
            runtime,
            checkpoint: None,
            traits,
            init: Arc::new(init),
            options,
            execs: Mutex::default(),
            facts: Mutex::default(),
            order: Mutex::default(),
            emitted: Notify::new(),
            standing: watch::Sender::new(Standing {
                stage: Stage::Creating,
                is_given_up: false,
            }),
            recording: tokio::sync::Mutex::new(Recording::On),
        }
    }

    /// A task as it was remembered. Its processes are not watched yet.
    pub(crate) fn restored(
        record: TaskRecord,
        runtime: Runtime,
        traits: Traits,
        fds: impl Fn(u64) -> ProcessFds,
    ) -> Self {
        let key = record.key();
        let own = fds(record.init.number);
        let init = TaskProcess::restored(None, record.init, own);
        let task = Self::with(
            key,
            record.bundle,
            record.owner,
            record.rootfs,
            record.runtime,
            runtime,
            traits,
            init,
        );
        if record.complete {
            task.set_stage(Stage::Live);
        }
        *task.facts() = Facts {
            cgroup: record.cgroup,
            oom_kills: record.oom_kills,
            last_metrics: record.last_metrics,
            is_checkpointing: record.is_checkpointing,
            unknown: record.unknown,
        };
        *task.execs() = record
            .execs
            .into_iter()
            .map(|(id, exec)| {
                let own = fds(exec.number);
                let exec = TaskProcess::restored(Some(id.clone()), exec, own);
                (id, Arc::new(exec))
            })
            .collect();
        Self {
            checkpoint: record.checkpoint,
            sandbox: record.sandbox,
            ..task
        }
    }

    /// What there is to remember.
    pub(crate) fn record(&self, boot_id: &str) -> TaskRecord {
        let facts = self.facts();
        TaskRecord {
            version: VERSION,
            boot_id: boot_id.to_owned(),
            namespace: self.key.namespace.clone(),
            id: self.key.id.clone(),
            bundle: self.bundle.clone(),
            owner: self.owner.clone(),
            sandbox: self.sandbox.clone(),
            runtime: self.options.clone(),
            checkpoint: self.checkpoint.clone(),
            rootfs: self.rootfs.clone(),
            traits: Some(self.traits),
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
            is_checkpointing: facts.is_checkpointing,
            unknown: facts.unknown.clone(),
        }
    }

    /// Only one record of it is written at a time: an older picture must not replace a newer one.
    pub(crate) async fn lock_recording(&self) -> tokio::sync::MutexGuard<'_, Recording> {
        self.recording.lock().await
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

    /// Where runc begins to write it. It does not overwrite what one has left that was killed.
    pub(crate) fn pid_draft(&self) -> PathBuf {
        self.bundle.path.join(".init.pid")
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

    /// Whether clients can see it.
    pub(crate) fn is_complete(&self) -> bool {
        matches!(self.standing.borrow().stage, Stage::Live | Stage::Adopted)
    }

    /// Clients can see it from now on.
    pub(crate) fn mark_complete(&self) {
        self.standing.send_modify(|standing| {
            standing.stage = match standing.stage {
                Stage::HalfCreated => Stage::Adopted,
                _ => Stage::Live,
            };
        });
    }

    /// Clients must not see it after all.
    pub(crate) fn mark_incomplete(&self) {
        self.standing.send_modify(|standing| {
            standing.stage = match standing.stage {
                Stage::Adopted => Stage::HalfCreated,
                _ => Stage::Creating,
            };
        });
    }

    /// Its creation was cut short: who wants its id waits for what becomes of it.
    pub(crate) fn mark_half_created(&self) {
        self.set_stage(Stage::HalfCreated);
    }

    /// It is a task like any other now.
    pub(crate) fn mark_adopted(&self) {
        self.set_stage(Stage::Live);
    }

    /// Its id is free.
    pub(crate) fn mark_released(&self) {
        self.set_stage(Stage::Released);
    }

    fn set_stage(&self, stage: Stage) {
        self.standing.send_modify(|standing| standing.stage = stage);
    }

    /// Whether it is being found out if its id is free.
    pub(crate) fn is_half_created(&self) -> bool {
        self.standing.borrow().is_undecided()
    }

    /// Waits until it is a task or its id is free.
    pub(crate) async fn decided(&self) {
        // The sender is a field of this task: it cannot be gone.
        let mut standing = self.standing.subscribe();
        let _ = standing.wait_for(|standing| !standing.is_undecided()).await;
    }

    /// A clean-up removes it: nothing is reported of it any more, the clean-up reports its end.
    pub(crate) fn give_up(&self) {
        self.standing
            .send_modify(|standing| standing.is_given_up = true);
    }

    /// Whether nothing is to be reported of it.
    pub(crate) fn is_given_up(&self) -> bool {
        self.standing.borrow().is_given_up
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

    /// Adds an exec; of several with one name exactly one wins (containerd 1a8df3f23).
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
        if self.order().has_init_ended() {
            return Err(self.init_not_running());
        }
        Ok(())
    }

    fn init_not_running(&self) -> Error {
        Error::InitNotRunning {
            id: self.id().to_owned(),
        }
    }

    /// Counts an exec as running, unless the init has ended (containerd e7357916b).
    pub(crate) fn enter_exec(&self) -> Result<(), Error> {
        if self.order().enter_exec() {
            return Ok(());
        }
        Err(self.init_not_running())
    }

    /// An exec does not run any more. Gives the init's exit event if it waited for that.
    #[must_use = "the event is the caller's to emit"]
    pub(crate) fn leave_exec(&self) -> Option<EventKind> {
        self.order().leave_exec()
    }

    /// No exec is started from here on.
    pub(crate) fn mark_init_ended(&self) {
        self.order().init_ended();
    }

    /// The init's exit event is due. Gives it back if no exec runs, and otherwise when the last one
    /// [leaves](Self::leave_exec).
    #[must_use = "the event is the caller's to emit"]
    pub(crate) fn init_exited(&self, exit: EventKind) -> Option<EventKind> {
        self.order().init_exited(exit)
    }

    /// The init's exit event is emitted, the last of its container.
    pub(crate) fn mark_exit_emitted(&self) {
        self.order().emitted();
        self.emitted.notify_waiters();
    }

    /// Waits until the init's exit event is emitted.
    pub(crate) async fn exit_emitted(&self) {
        loop {
            let emitted = self.emitted.notified();
            if self.order().is_over() {
                return;
            }
            emitted.await;
        }
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

    /// The kernel's count of OOM kills, as far as it was noted.
    pub(crate) fn oom_kills(&self) -> u64 {
        self.facts().oom_kills
    }

    /// Notes that a checkpoint begins or is over; to be stored before it begins.
    pub(crate) fn set_checkpointing(&self, is_checkpointing: bool) {
        self.facts().is_checkpointing = is_checkpointing;
    }

    /// Whether a checkpoint has begun, a predecessor's perhaps, which may have frozen it.
    pub(crate) fn is_checkpointing(&self) -> bool {
        self.facts().is_checkpointing
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

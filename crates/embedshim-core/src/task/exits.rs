//! Exits: from the monitor's report to the answered `Wait`, the event and the end of the watch.
//! Owns their order (invariants 3 and 5): the rest is killed with the init, OOM before exit,
//! durable before visible, execs before the init.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::{debug, error, info, warn};

use crate::blocking::{blocking, quickly};
use crate::cgroup::Metrics;
use crate::error::Error;
use crate::event::EventKind;
use crate::exit::{Evidence, ExitRecord, ExitStatus};
use crate::fdstore::FdRole;
use crate::process::ProcessIdentity;
use crate::task::api::Exit;
use crate::task::engine::Engine;
use crate::task::lifecycle::Phase;
use crate::task::ops::kill::thaw;
use crate::task::process::TaskProcess;
use crate::task::task::Task;

/// A monitor that fails is asked again after this.
const MONITOR_RETRY: Duration = Duration::from_secs(1);
/// How long an exit waits for each thing that its cgroup is asked for: the last reading of the
/// counters, the end of its other processes, its OOM kills.
const LAST_READ: Duration = Duration::from_secs(5);

impl Engine {
    /// Brings every exit to its task, without end.
    pub(in crate::task) async fn dispatch_exits(self: Arc<Self>) {
        let mut batch = Vec::new();
        loop {
            batch.clear();
            if let Err(error) = self.monitor.next_exits(&mut batch).await {
                error!(%error, "the exit monitor fails: exits are delayed until it answers again");
                tokio::time::sleep(MONITOR_RETRY).await;
                continue;
            }
            for record in batch.drain(..) {
                if let Some(tracked) = self.registry.tracked(record.process) {
                    self.report_exit(&tracked.task, &tracked.process, record);
                } else if let Err(error) = self.monitor.confirm(record.process).await {
                    // It was deleted or its start failed meanwhile.
                    debug!(
                        pid = record.process.pid, %error,
                        "cannot free the kernel's exit record of a process without a task"
                    );
                }
            }
        }
    }

    /// Keeps the exit while its process is being started, or settles it.
    pub(in crate::task) fn report_exit(
        self: &Arc<Self>,
        task: &Arc<Task>,
        process: &Arc<TaskProcess>,
        record: ExitRecord,
    ) {
        if let Some(record) = process.report(record) {
            self.spawn_settling(task, process, record);
        }
    }

    /// The operation's event is emitted: an exit that waited for that may follow.
    pub(in crate::task) fn release_exit(
        self: &Arc<Self>,
        task: &Arc<Task>,
        process: &Arc<TaskProcess>,
    ) {
        if let Some(record) = process.release() {
            self.spawn_settling(task, process, record);
        }
    }

    fn spawn_settling(
        self: &Arc<Self>,
        task: &Arc<Task>,
        process: &Arc<TaskProcess>,
        record: ExitRecord,
    ) {
        let engine = Arc::clone(self);
        let (task, process) = (Arc::clone(task), Arc::clone(process));
        tokio::spawn(async move {
            let record = engine.better_known(record).await;
            engine.conclude(&task, &process, record).await;
        });
    }

    /// The store's process, if it has reaped this one, knows better than a record that says nothing
    /// or that can be wrong.
    async fn better_known(&self, mut record: ExitRecord) -> ExitRecord {
        if matches!(record.evidence, Evidence::None | Evidence::PidfdInfo) {
            let identity = record.process;
            let is_its = |start_ticks| start_ticks == identity.start_ticks;
            if let Some((_, status)) = self.reaped_by_store(identity.pid, is_its).await {
                (record.status, record.evidence) = (status, Evidence::Wait);
            }
        }
        record
    }

    /// How the latest process with this number and a start that fits has ended, if the store's
    /// process has inherited and reaped it, as the keeper does after a while; and when it began.
    pub(in crate::task) async fn reaped_by_store(
        &self,
        pid: i32,
        fits: impl Fn(u64) -> bool,
    ) -> Option<(u64, ExitStatus)> {
        let store = Arc::clone(&self.config.descriptors);
        let reaped = match blocking(move || store.reaped(pid)).await.ok()? {
            Ok(reaped) => reaped,
            Err(error) => {
                warn!(pid, %error, "cannot ask the descriptor store how a process ended");
                return None;
            }
        };
        let mut fitting = reaped.into_iter().filter(|(start, _)| fits(*start));
        let (start_ticks, status) = fitting.next()?;
        Some((start_ticks, ExitStatus::from_wait_status(status)))
    }

    /// Everything that follows from the end of a process, once.
    pub(in crate::task) async fn conclude(
        self: &Arc<Self>,
        task: &Arc<Task>,
        process: &Arc<TaskProcess>,
        record: ExitRecord,
    ) {
        let is_init = process.exec.is_none();
        let mut last_reading = None;
        if is_init {
            task.mark_init_ended();
            last_reading = begin_last_reading(task);
            self.end_the_rest(task).await;
        }
        let exit = Exit {
            code: record.status.code(),
            at: record.at.to_wall(),
            status: Some(record.status),
            evidence: Some(record.evidence),
        };
        if !process.end(exit) {
            return;
        }
        let streams = process.streams();
        if let Some(streams) = &streams {
            streams.end_of_process();
        }
        self.flush_oom(task).await;
        // A client that hears of the exit reads no more. Before it is saved: a successor emits at
        // once what is recorded.
        if let Some(streams) = &streams {
            streams.taken().await;
        }
        // Known, durable, visible: in this order.
        let saved = self.save(task).await;
        if let Some(streams) = streams {
            streams.exit_is_published();
        }
        process.publish_end(&saved);
        log(task, process, &record);
        if let Some(observer) = &self.config.observer {
            observer.exited(&record, is_init);
        }
        let exited = EventKind::Exited {
            exec: process.exec.clone(),
            pid: process.now().pid,
            exit_code: exit.code,
            exited_at: exit.at,
        };
        if is_init {
            self.emit_init_exit(task, task.init_exited(exited));
        } else {
            self.emit(task, exited);
            self.emit_init_exit(task, task.leave_exec());
        }
        self.registry.untrack(record.process);
        if let Some(reading) = last_reading {
            self.keep_last_reading(task, reading).await;
        }
        match saved {
            // The kernel's record is given up only for a durable one: a successor can still ask for
            // it.
            Ok(_) => self.confirm(process, &record).await,
            Err(error) => {
                error!(
                    id = %task.id(), %error,
                    "cannot store an exit: a successor learns it from the kernel again"
                );
            }
        }
    }

    /// Keeps a reading for a successor, too. The exit is public by now.
    async fn keep_last_reading(
        &self,
        task: &Arc<Task>,
        reading: JoinHandle<Result<Option<Metrics>, Error>>,
    ) {
        let read = reading
            .await
            .map_err(|end| Error::Internal(end.to_string()));
        let kept = match read.flatten() {
            Ok(None) => return,
            Ok(Some(metrics)) => {
                task.keep_metrics(metrics);
                self.save(task).await.map(drop)
            }
            Err(error) => Err(error),
        };
        if let Err(error) = kept {
            warn!(id = %task.id(), %error, "cannot keep the last counters of a container");
        }
    }

    /// The exit is on disk: what else keeps it may go.
    async fn confirm(&self, process: &TaskProcess, record: &ExitRecord) {
        process.fds.remove(&[FdRole::Pidfd]);
        if let Err(error) = self.monitor.confirm(record.process).await {
            warn!(pid = record.process.pid, %error, "cannot free the kernel's exit record");
        }
        // Our own children are reaped by now.
        if record.evidence != Evidence::Wait {
            self.let_be_reaped(record.process);
        }
    }

    /// A zombie that a predecessor has left may go: its end is written down.
    pub(in crate::task) fn let_be_reaped(&self, process: ProcessIdentity) {
        if let Err(error) = self.config.descriptors.reap(process) {
            debug!(pid = process.pid, %error, "cannot ask the descriptor store to reap a zombie");
        }
    }

    /// With the init its container ends. A frozen cgroup would keep the others from dying, a shared
    /// pid namespace from having to.
    async fn end_the_rest(&self, task: &Arc<Task>) {
        if matches!(task.init.now().phase(), Phase::Paused | Phase::Pausing)
            && let Err(error) = thaw(task).await
        {
            debug!(id = %task.id(), %error, "cannot thaw a container whose init has ended");
        }
        if task.traits.own_pid_namespace {
            return;
        }
        let Some(cgroup) = task.cgroup() else { return };
        let _guard = self.reaper.guard();
        match timeout(LAST_READ, blocking(move || cgroup.kill_all())).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => warn!(
                id = %task.id(), %error,
                "cannot end all processes of a container in a shared pid namespace"
            ),
            Ok(Err(error)) => {
                warn!(id = %task.id(), %error, "cannot end all processes of a container");
            }
            Err(late) => warn!(
                id = %task.id(), %late,
                "cannot end all processes of a container: its cgroup does not answer"
            ),
        }
    }

    /// One last look: the OOM event precedes the exit it caused, even if its notification was not
    /// read yet (containerd 62845f4a9).
    pub(in crate::task) async fn flush_oom(&self, task: &Arc<Task>) {
        let Some(cgroup) = task.cgroup() else { return };
        match timeout(LAST_READ, quickly(move || cgroup.oom_kills())).await {
            Ok(Ok(Some(kills))) if task.count_oom_kills(kills) => self.emit(task, EventKind::Oom),
            Ok(_) => {}
            Err(late) => warn!(
                id = %task.id(), %late,
                "cannot read the OOM counter of a container: its cgroup does not answer"
            ),
        }
    }

    /// Emits OOM kills while the container lives on, without end.
    pub(in crate::task) async fn watch_oom(self: Arc<Self>) {
        loop {
            let serial = self.oom.next().await;
            let mut tasks = self.registry.all().into_iter();
            if let Some(task) = tasks.find(|task| task.serial == serial) {
                self.flush_oom(&task).await;
            }
        }
    }
}

fn log(task: &Task, process: &TaskProcess, record: &ExitRecord) {
    let (namespace, id, pid) = (&task.key.namespace, task.id(), record.process.pid);
    let exec_id = process.exec.as_ref().map(tracing::field::display);
    let evidence = record.evidence;
    if let ExitStatus::Unknown { reason } = record.status {
        warn!(
            %namespace, id, exec_id, pid, %reason,
            "process ended with an unknown status: reporting 255"
        );
    } else if exec_id.is_some() {
        // A node has as many of them as it has probes.
        debug!(%namespace, id, exec_id, pid, status = %record.status, ?evidence, "process ended");
    } else {
        info!(%namespace, id, pid, status = %record.status, ?evidence, "process ended");
    }
}

/// Begins to read the counters for those who ask after the end, of a cgroup that systemd removes as
/// soon as it is empty. Others stay until the deletion.
fn begin_last_reading(task: &Arc<Task>) -> Option<JoinHandle<Result<Option<Metrics>, Error>>> {
    let reading = Arc::clone(task);
    task.runtime
        .has_systemd_cgroup()
        .then(|| tokio::spawn(async move { current_metrics(&reading, LAST_READ).await }))
}

/// The counters now, if there is still a cgroup. Not to be read in time is no sign that there is
/// none.
pub(in crate::task) async fn current_metrics(
    task: &Arc<Task>,
    limit: Duration,
) -> Result<Option<Metrics>, Error> {
    let Some(cgroup) = task.cgroup() else {
        return Ok(None);
    };
    match timeout(limit, blocking(move || cgroup.metrics())).await {
        Ok(read) => Ok(read?.ok()),
        Err(_late) => Err(Error::Deadline {
            what: "reading the counters of a cgroup",
            seconds: limit.as_secs(),
        }),
    }
}

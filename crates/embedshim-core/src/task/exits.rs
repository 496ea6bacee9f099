//! Exits: from the monitor's record to the answered `Wait`, the event and the forgotten watch. Owns
//! their order (`containerd.md` 4.5): killed with the init, OOM before exit, durable before
//! visible, execs before init.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use tracing::{debug, error, info, warn};

use crate::cgroup::Metrics;
use crate::error::Error;
use crate::event::EventKind;
use crate::exit::{Evidence, ExitRecord, ExitStatus};
use crate::fdstore::FdRole;
use crate::process::ProcessIdentity;
use crate::task::api::Exit;
use crate::task::detached::blocking;
use crate::task::engine::{Owner, Shared};
use crate::task::lifecycle::Phase;
use crate::task::ops::kill as control;
use crate::task::process::TaskProcess;
use crate::task::task::Task;

/// A monitor that fails is asked again after this.
const MONITOR_RETRY: Duration = Duration::from_secs(1);
/// How long an exit waits for the last reading of the counters.
const LAST_READ: Duration = Duration::from_secs(5);

/// Brings every exit to its owner, for ever.
pub(super) async fn dispatch(shared: Arc<Shared>) {
    let mut batch = Vec::new();
    loop {
        batch.clear();
        if let Err(error) = shared.monitor.next_exits(&mut batch).await {
            error!(%error, "the exit monitor fails: exits are delayed until it answers again");
            tokio::time::sleep(MONITOR_RETRY).await;
            continue;
        }
        for record in batch.drain(..) {
            if let Some(owner) = shared.owner(record.process) {
                arrive(&shared, owner, record);
            } else if let Err(error) = shared.monitor.confirm(record.process).await {
                // It was deleted or disowned meanwhile: nobody asks any more.
                debug!(pid = record.process.pid, %error, "cannot free the record of a process that nobody owns");
            }
        }
    }
}

/// Keeps the exit back while its process is being started, or settles it.
pub(super) fn arrive(shared: &Arc<Shared>, owner: Owner, record: ExitRecord) {
    let Owner { task, process, .. } = owner;
    if let Some(record) = process.hold(record) {
        tokio::spawn(settle(Arc::clone(shared), task, process, record));
    }
}

/// The start's event is out: an exit that came before may follow.
pub(super) fn release_early(shared: &Arc<Shared>, task: &Arc<Task>, process: &Arc<TaskProcess>) {
    if let Some(record) = process.started() {
        tokio::spawn(settle(
            Arc::clone(shared),
            Arc::clone(task),
            Arc::clone(process),
            record,
        ));
    }
}

/// Everything that follows from the end of a process, once. The store that has reaped it
/// knows better than a record that says nothing, or that can be wrong.
pub(super) async fn settle(
    shared: Arc<Shared>,
    task: Arc<Task>,
    process: Arc<TaskProcess>,
    mut record: ExitRecord,
) {
    if matches!(record.evidence, Evidence::None | Evidence::PidfdInfo) {
        let identity = record.process;
        let is_its = |start_ticks| start_ticks == identity.start_ticks;
        if let Some((_, status)) = reaped_by_store(&shared, identity.pid, is_its).await {
            (record.status, record.evidence) = (status, Evidence::Wait);
        }
    }
    conclude(shared, task, process, record).await;
}

/// How the latest process with this number and a start that fits has ended, if the store's process
/// has inherited and reaped it, as the keeper does after a while; and when it began.
pub(super) async fn reaped_by_store(
    shared: &Shared,
    pid: i32,
    fits: impl Fn(u64) -> bool,
) -> Option<(u64, ExitStatus)> {
    let store = Arc::clone(&shared.config.descriptors);
    let reaped = match blocking(move || store.reaped(pid)).await.ok()? {
        Ok(reaped) => reaped,
        Err(error) => {
            warn!(pid, %error, "cannot ask who keeps our descriptors how a process has ended");
            return None;
        }
    };
    let mut fitting = reaped.into_iter().filter(|(start, _)| fits(*start));
    let (start_ticks, status) = fitting.next()?;
    Some((start_ticks, ExitStatus::from_wait_status(status)))
}

/// The same, of a process of which nobody knows more than the record says.
pub(super) async fn conclude(
    shared: Arc<Shared>,
    task: Arc<Task>,
    process: Arc<TaskProcess>,
    record: ExitRecord,
) {
    let is_init = process.exec.is_none();
    if is_init {
        task.init_ended();
        end_the_rest(&shared, &task).await;
    }
    let exit = Exit {
        code: record.status.code(),
        at: record.at.to_wall(),
        status: Some(record.status),
    };
    if !process.end(exit) {
        return;
    }
    let streams = process.streams();
    if let Some(streams) = &streams {
        streams.end_of_process();
    }
    flush_oom(&shared, &task).await;
    // A client that hears of the exit reads no more. Before it is saved: a successor tells at once
    // what is.
    if let Some(streams) = &streams {
        streams.taken().await;
    }
    let durable = task.save(&shared).await;
    if let Some(streams) = streams {
        streams.exit_is_told();
    }
    process.publish_end();
    log(&task, &process, &record);
    let told = EventKind::Exited {
        exec: process.exec.clone(),
        pid: process.now().pid,
        exit_code: exit.code,
        exited_at: exit.at,
    };
    if is_init {
        task.tell_init_exit(&shared, told);
    } else {
        shared.emit(&task, told);
        task.leave_exec(&shared);
    }
    shared.disown(record.process);
    match durable {
        // The kernel's record is given up only for a durable one: a successor can still ask for it.
        Ok(()) => {
            process.fds.forget(&[FdRole::Pidfd]);
            if let Err(error) = shared.monitor.confirm(record.process).await {
                warn!(pid = record.process.pid, %error, "cannot free the kernel's exit record");
            }
            // Our own children are reaped by now.
            if record.evidence != Evidence::Wait {
                let_be_reaped(&shared, record.process);
            }
        }
        Err(error) => {
            error!(id = %task.id(), %error, "an exit is not durable: it would be learned again after a restart");
        }
    }
}

/// A zombie that a predecessor has left may go: its end is written down.
pub(super) fn let_be_reaped(shared: &Shared, process: ProcessIdentity) {
    if let Err(error) = shared.config.descriptors.reap(process) {
        debug!(pid = process.pid, %error, "whoever keeps for us cannot be told to reap a zombie");
    }
}

fn log(task: &Task, process: &TaskProcess, record: &ExitRecord) {
    let (namespace, id, pid) = (&task.key.namespace, task.id(), record.process.pid);
    let exec_id = process.exec.as_ref().map(tracing::field::display);
    let evidence = record.evidence;
    if let ExitStatus::Unknown { reason } = record.status {
        warn!(%namespace, id, exec_id, pid, %reason, "ended, and nobody knows how: 255 is reported");
    } else if exec_id.is_some() {
        // A node has as many of them as it has probes.
        debug!(%namespace, id, exec_id, pid, status = %record.status, ?evidence, "ended");
    } else {
        info!(%namespace, id, pid, status = %record.status, ?evidence, "ended");
    }
}

/// With the init its container ends. A frozen cgroup would keep the others from dying, a shared pid
/// namespace from having to.
async fn end_the_rest(shared: &Shared, task: &Arc<Task>) {
    if matches!(task.init.now().phase, Phase::Paused | Phase::Pausing)
        && let Err(error) = control::thaw(task).await
    {
        debug!(id = %task.id(), %error, "cannot thaw a container whose init has ended");
    }
    read_metrics(task).await;
    if task.has_own_pid_namespace {
        return;
    }
    let Some(cgroup) = task.cgroup() else { return };
    let _ticket = shared.orphans.ticket();
    match blocking(move || cgroup.kill_all()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            warn!(id = %task.id(), %error, "cannot end all processes of a container in a shared pid namespace");
        }
        Err(error) => warn!(id = %task.id(), %error, "cannot end all processes of a container"),
    }
}

/// One last look: the OOM event precedes the exit it caused, even if its notification was not read
/// yet (62845f4a9).
async fn flush_oom(shared: &Shared, task: &Arc<Task>) {
    if let Some(cgroup) = task.cgroup()
        && let Ok(Some(kills)) = blocking(move || cgroup.oom_kills()).await
        && task.count_oom_kills(kills)
    {
        shared.emit(task, EventKind::Oom);
    }
}

/// Keeps the counters for those who ask after the end, when the cgroup may be gone.
async fn read_metrics(task: &Arc<Task>) {
    match current_metrics(task, LAST_READ).await {
        Ok(Some(metrics)) => task.keep_metrics(metrics),
        Ok(None) => {}
        Err(error) => {
            warn!(id = %task.id(), %error, "the last counters of a container are missing");
        }
    }
}

/// The counters now, if there is still a cgroup. Not to be read in time is no sign that there is
/// none.
pub(super) async fn current_metrics(
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

/// Tells of OOM kills while the container lives on, for ever.
pub(super) async fn watch_oom(shared: Arc<Shared>) {
    loop {
        let serial = shared.oom.next().await;
        if let Some(task) = shared.all().into_iter().find(|task| task.serial == serial) {
            flush_oom(&shared, &task).await;
        }
    }
}

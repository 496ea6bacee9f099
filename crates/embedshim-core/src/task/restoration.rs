//! A new daemon takes over what its predecessor left: records on disk, processes in the kernel, mounts, descriptors.
//! Owns the comparison of the two; the truth about a process is the kernel's, about everything else the record's.

use std::sync::Arc;

use tracing::{info, warn};

use super::container::Task;
use super::creation::{remove_traces, watch_for_oom};
use super::detached::blocking;
use super::exits;
use super::process::TaskProcess;
use super::shared::Shared;
use super::state::Phase;
use crate::clock::BootTime;
use crate::error::Error;
use crate::event::EventKind;
use crate::exit::{Adopted, Evidence, ExitRecord, ExitStatus, UnknownReason};
use crate::process::{Process, ProcessIdentity};
use crate::runtime::Runtime;
use crate::spec::Spec;
use crate::stdio::{HeldStdio, Plan, Streams};
use crate::store::{Bundle, TaskRecord};

/// A process that the record believes alive.
struct Believed {
    identity: ProcessIdentity,
    task: Arc<Task>,
    process: Arc<TaskProcess>,
}

/// Takes over everything in the store. Afterwards every task is there, and every exit that happened meanwhile is on its way.
pub(super) async fn restore(shared: &Arc<Shared>) -> Result<(), Error> {
    let store = shared.store.clone();
    let records = blocking(move || store.load()).await??;
    let mut believed = Vec::new();
    let mut of_this_boot = Vec::new();
    for record in records {
        let same_boot = record.boot_id == shared.boot_id;
        let Some(task) = restore_task(shared, record).await? else {
            continue;
        };
        let alive = believed_alive(&task);
        if same_boot {
            of_this_boot.extend(alive.iter().map(|believed| believed.identity.into()));
            believed.extend(alive);
        } else {
            warn!(
                id = %task.id(),
                "the task is of an earlier boot: its processes are gone"
            );
            for dead in alive {
                lost(shared, dead);
            }
        }
    }
    let found = shared.monitor.adopt(of_this_boot).await?;
    info!(processes = found.len(), "took over");
    for (believed, found) in believed.into_iter().zip(found) {
        shared.own(believed.identity, &believed.task, &believed.process);
        match found {
            Adopted::Armed(process) => {
                believed.process.runs_as(process);
                reconnect(&believed).await;
                agree_on_phase(&believed).await;
                if believed.process.exec.is_none() {
                    watch_for_oom(shared, &believed.task);
                }
            }
            Adopted::Ended(record) => spawn_settle(shared, believed, record),
        }
    }
    Ok(())
}

async fn restore_task(
    shared: &Arc<Shared>,
    record: TaskRecord,
) -> Result<Option<Arc<Task>>, Error> {
    let path = record.bundle.path.clone();
    let spec = match blocking(move || Spec::read(&path)).await? {
        Ok(spec) => spec,
        Err(error) => {
            warn!(id = %record.id, %error, "the bundle cannot be read: its container is treated as sharing a pid namespace");
            Spec::default()
        }
    };
    let deadline = shared.config.runtime_deadline;
    let runtime = Runtime::new(
        &record.runtime,
        &record.namespace,
        &spec,
        deadline,
        shared.orphans.clone(),
    );
    let complete = record.complete;
    let task = Arc::new(Task::restored(
        record,
        runtime,
        spec.has_own_pid_namespace(),
    ));
    if !complete {
        warn!(
            id = %task.id(),
            "removing a task whose creation was cut short"
        );
        remove_traces(shared, &task, true).await;
        return Ok(None);
    }
    if is_forsaken(&task).await? {
        warn!(id = %task.id(), "removing a dead task whose bundle is gone: nobody will ever ask for it");
        remove_traces(shared, &task, true).await;
        return Ok(None);
    }
    shared.reserve(&task)?;
    if let Some(exit) = task.init.now().exit {
        task.init_ended();
        // Stopped and not deleted: nobody has acted on this exit, so perhaps nobody heard of it.
        let pid = task.init.now().pid;
        let told = EventKind::Exited {
            exec: None,
            pid,
            exit_code: exit.code,
            exited_at: exit.at,
        };
        task.tell_init_exit(shared, told);
    }
    Ok(Some(task))
}

/// containerd removed the bundle while no daemon was there to clean up with it, and nothing of the task lives.
async fn is_forsaken(task: &Arc<Task>) -> Result<bool, Error> {
    let (bundle, identity) = (task.bundle.clone(), task.init.identity());
    blocking(move || {
        let is_there = Bundle::open(&bundle.path).is_ok_and(|found| found == bundle);
        let alive = |identity| {
            Process::reopen(identity).is_ok_and(|process| !process.has_ended().unwrap_or(false))
        };
        !is_there && !identity.is_some_and(alive)
    })
    .await
}

fn believed_alive(task: &Arc<Task>) -> Vec<Believed> {
    let mut alive = Vec::new();
    for process in task.all_execs().into_iter().chain([Arc::clone(&task.init)]) {
        let Some(identity) = process.identity() else {
            continue;
        };
        if process.now().exit.is_some() {
            continue;
        }
        if process.exec.is_some() && task.enter_exec().is_err() {
            // The init has ended before: the exec's end is only to be learned, nothing waits for it.
            warn!(id = %task.id(), "an exec outlived its init");
        }
        alive.push(Believed {
            identity,
            task: Arc::clone(task),
            process,
        });
    }
    alive
}

fn lost(shared: &Arc<Shared>, dead: Believed) {
    let record = ExitRecord {
        process: dead.identity,
        status: ExitStatus::Unknown {
            reason: UnknownReason::Unwatched,
        },
        at: BootTime::now(),
        evidence: Evidence::None,
    };
    spawn_settle(shared, dead, record);
}

fn spawn_settle(shared: &Arc<Shared>, dead: Believed, record: ExitRecord) {
    tokio::spawn(exits::settle(
        Arc::clone(shared),
        dead.task,
        dead.process,
        record,
    ));
}

/// Fifos can be opened again. A terminal's master died with its holder.
async fn reconnect(believed: &Believed) {
    let process = &believed.process;
    let plan = match Plan::parse(&process.stdio) {
        Ok(plan) if plan.terminal() => {
            warn!(
                id = %believed.task.id(),
                "its terminal is lost: it went with the daemon that held it"
            );
            return;
        }
        Ok(plan) => plan,
        Err(error) => {
            warn!(id = %believed.task.id(), %error, "cannot reopen its standard streams");
            return;
        }
    };
    if let Ok(held) = blocking(move || HeldStdio::reopen(&plan)).await {
        process.connect(Streams::Held(held));
    }
}

/// The record may be one step behind the container: then the runtime knows.
async fn agree_on_phase(believed: &Believed) {
    let (task, process) = (&believed.task, &believed.process);
    if process.exec.is_some() {
        // An exec with a pid runs.
        process.advance(Phase::Created, Phase::Running);
        return;
    }
    let recorded = process.now().phase;
    if !matches!(recorded, Phase::Created | Phase::Pausing) {
        return;
    }
    match task.runtime.status(task.id(), &task.log()).await {
        Ok(status) => {
            let phase = match status.as_str() {
                "running" => Phase::Running,
                "paused" => Phase::Paused,
                _ => return,
            };
            process.advance(recorded, phase);
        }
        Err(error) => {
            warn!(id = %task.id(), %error, "cannot ask the runtime for the container's state");
        }
    }
}

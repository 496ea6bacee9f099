//! A new daemon takes over what its predecessor left: records on disk, processes in the kernel, mounts, descriptors.
//! Owns the comparison of the two; the truth about a process is the kernel's, about everything else the record's.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use tracing::{info, warn};

use crate::clock::BootTime;
use crate::error::Error;
use crate::event::EventKind;
use crate::exit::{Adopted, Evidence, ExitRecord, ExitStatus, Known, UnknownReason};
use crate::fdstore::{FdName, FdRole, InheritedFds};
use crate::process::{Process, ProcessIdentity};
use crate::runtime::{InFlightCalls, Runtime};
use crate::spec::Spec;
use crate::stdio;
use crate::task::api::Exit;
use crate::task::context::RequestId;
use crate::task::detached::blocking;
use crate::task::engine::Shared;
use crate::task::exits;
use crate::task::launch::{remove_traces, watch_for_oom};
use crate::task::lifecycle::Phase;
use crate::task::process::TaskProcess;
use crate::task::recovery::finish::{Unfinished, reconnect};
use crate::task::recovery::half_created;
use crate::task::store::{Bundle, TaskRecord};
use crate::task::task::Task;

/// A process that the record believes alive.
struct Believed {
    identity: ProcessIdentity,
    pidfd: Option<OwnedFd>,
    task: Arc<Task>,
    process: Arc<TaskProcess>,
}

/// What is on disk of a task.
struct Remains {
    record: TaskRecord,
    spec: Spec,
    /// containerd removed the bundle while no daemon was there to clean up with it, and nothing of the task lives.
    is_forsaken: bool,
}

impl Remains {
    /// Looks. Blocks on the file system.
    fn of(record: TaskRecord) -> Self {
        let spec = Spec::read(&record.bundle.path).unwrap_or_else(|error| {
            warn!(id = %record.id, %error, "the bundle cannot be read: its container is treated as sharing a pid namespace");
            Spec::default()
        });
        let is_there = Bundle::open(&record.bundle.path).is_ok_and(|found| found == record.bundle);
        let alive = |identity| {
            Process::reopen(identity).is_ok_and(|process| !process.has_ended().unwrap_or(false))
        };
        let is_forsaken = !is_there && !record.init.identity.is_some_and(alive);
        Self {
            record,
            spec,
            is_forsaken,
        }
    }
}

/// What is found out about all tasks, before anything is done about it.
#[derive(Default)]
struct Findings {
    believed: Vec<Believed>,
    /// Of an earlier boot: nobody knows how they ended.
    lost: Vec<Believed>,
    unfinished: Vec<Unfinished>,
}

/// Takes over everything in the store. Afterwards every task is there, and every exit that happened meanwhile is on its way.
pub(in crate::task) async fn restore(
    shared: &Arc<Shared>,
    inherited: &mut InheritedFds,
) -> Result<(), Error> {
    let store = shared.store.clone();
    // All of it in one go: a change of threads for each of 500 tasks would take longer than the work.
    let (remains, mut calls) = blocking(move || {
        let remains: Vec<Remains> = store.load()?.into_iter().map(Remains::of).collect();
        // Nothing was under way where there is no record.
        let calls = if remains.is_empty() {
            InFlightCalls::default()
        } else {
            InFlightCalls::find()
        };
        Ok::<_, Error>((remains, calls))
    })
    .await??;
    let mut findings = Findings::default();
    for remains in remains {
        let calls = calls.take(&remains.record.bundle.path);
        let is_of_this_boot = remains.record.boot_id == shared.boot_id;
        if let Some(task) = restore_task(shared, remains, &calls).await? {
            examine(
                shared,
                &task,
                is_of_this_boot,
                calls,
                inherited,
                &mut findings,
            );
        }
    }
    let known = findings.believed.iter_mut().map(|believed| Known {
        identity: believed.identity,
        pidfd: believed.pidfd.take(),
    });
    let found = shared.monitor.adopt(known.collect()).await?;
    info!(processes = found.len(), "took over");
    // First: it keeps ends back that must not come before what they end.
    for unfinished in findings.unfinished {
        unfinished.finish(shared);
    }
    for (believed, found) in findings.believed.into_iter().zip(found) {
        shared.own(believed.identity, &believed.task, &believed.process);
        let (task, process) = (&believed.task, &believed.process);
        if let Adopted::Armed(alive) = &found {
            process.runs_as(Arc::clone(alive));
            if process.exec.is_none() {
                watch_for_oom(shared, task);
            }
        }
        reconnect(task, process);
        if let Adopted::Ended(record) = found {
            end(shared, task, process, record);
        }
    }
    take_client_ends(shared, inherited);
    remove_abandoned_sockets(shared).await;
    for lost in findings.lost {
        let record = ExitRecord {
            process: lost.identity,
            status: ExitStatus::Unknown {
                reason: UnknownReason::Unwatched,
            },
            at: BootTime::now(),
            evidence: Evidence::None,
        };
        if let Some(record) = lost.process.hold(record) {
            tokio::spawn(exits::conclude(
                Arc::clone(shared),
                lost.task,
                lost.process,
                record,
            ));
        }
    }
    Ok(())
}

async fn restore_task(
    shared: &Arc<Shared>,
    remains: Remains,
    calls: &[Process],
) -> Result<Option<Arc<Task>>, Error> {
    let Remains {
        record,
        spec,
        is_forsaken,
    } = remains;
    let deadline = shared.config.runtime_deadline;
    let runtime = Runtime::new(
        &record.runtime,
        &record.namespace,
        &spec,
        deadline,
        shared.orphans.clone(),
    );
    let task = Arc::new(Task::restored(
        record,
        runtime,
        spec.has_own_pid_namespace(),
        |number| shared.fds_of(number),
    ));
    if task.is_complete() && calls.is_empty() && is_forsaken {
        warn!(id = %task.id(), "removing a dead task whose bundle is gone: nobody will ever ask for it");
        remove_traces(shared, &task, true).await;
        return Ok(None);
    }
    shared.reserve(&task)?;
    Ok(Some(task))
}

/// Looks at one task: what of it is alive, what has ended, what is half done.
fn examine(
    shared: &Arc<Shared>,
    task: &Arc<Task>,
    is_of_this_boot: bool,
    calls: Vec<Process>,
    inherited: &mut InheritedFds,
    findings: &mut Findings,
) {
    if !task.is_complete() {
        task.init.fds.inherit(inherited);
        half_created::finish(shared, Arc::clone(task), calls);
        return;
    }
    if !is_of_this_boot {
        warn!(id = %task.id(), "the task is of an earlier boot: its processes are gone");
    }
    let mut unfinished = Unfinished::of(task, calls);
    // Execs first, since the init's end is the last of its container.
    for process in task.all_execs().into_iter().chain([Arc::clone(&task.init)]) {
        process.fds.inherit(inherited);
        let now = process.now();
        if let Some(exit) = now.exit {
            has_ended(shared, task, &process, exit);
        } else if let Some(identity) = process.identity().filter(|_| !now.start_failed) {
            if process.exec.is_some() && task.enter_exec().is_err() {
                // The init has ended before: the exec's end is only to be learned, nothing waits for it.
                warn!(id = %task.id(), "an exec outlived its init");
            }
            if process.exec.is_some() && now.phase == Phase::Created && is_of_this_boot {
                unfinished.untold_exec(Arc::clone(&process));
            }
            let believed = Believed {
                identity,
                pidfd: process
                    .fds
                    .get(FdRole::Pidfd)
                    .and_then(|pidfd| pidfd.as_fd().try_clone_to_owned().ok()),
                task: Arc::clone(task),
                process,
            };
            if is_of_this_boot {
                findings.believed.push(believed);
            } else {
                findings.lost.push(believed);
            }
        } else if process.exec.is_some() && process.start_mark().is_some() && is_of_this_boot {
            unfinished.exec(process);
        } else if process.exec.is_none() && process.start_mark().is_some() && is_of_this_boot {
            // A restore that was cut short: its client reads on.
            stdio::discard_pipes(&process.fds);
        } else {
            process.fds.forget_all();
        }
    }
    if is_of_this_boot && unfinished.is_something() {
        findings.unfinished.push(unfinished);
    }
}

/// It ended and is not deleted: nobody has acted on this exit, so perhaps nobody heard of it.
fn has_ended(shared: &Shared, task: &Arc<Task>, process: &Arc<TaskProcess>, exit: Exit) {
    if let Some(identity) = process.identity() {
        exits::let_be_reaped(shared, identity);
    }
    process.fds.forget(&[FdRole::Pidfd]);
    reconnect(task, process);
    if let Some(streams) = process.streams() {
        streams.end_of_process();
    }
    let told = EventKind::Exited {
        exec: process.exec.clone(),
        pid: process.now().pid,
        exit_code: exit.code,
        exited_at: exit.at,
    };
    if process.exec.is_some() {
        shared.emit(task, told);
    } else {
        task.init_ended();
        task.tell_init_exit(shared, told);
    }
}

/// Its end is told when nothing that has to come first is under way.
fn end(shared: &Arc<Shared>, task: &Arc<Task>, process: &Arc<TaskProcess>, record: ExitRecord) {
    if let Some(record) = process.hold(record) {
        tokio::spawn(exits::settle(
            Arc::clone(shared),
            Arc::clone(task),
            Arc::clone(process),
            record,
        ));
    }
}

/// A predecessor has removed what was half created, and died before the request came again: its client still reads.
fn take_client_ends(shared: &Arc<Shared>, inherited: &mut InheritedFds) {
    let numbers: Vec<u64> = inherited
        .counts()
        .filter_map(|(name, _)| match name {
            FdName::Process(number) => Some(number),
            FdName::Listener | FdName::Connection(_) | FdName::Answer(_) => None,
        })
        .collect();
    for number in numbers {
        let fds = shared.fds_of(number);
        fds.inherit(inherited);
        let request = fds
            .left_to()
            .map(|(connection, stream)| RequestId { connection, stream });
        shared.leave_client_ends(request, fds);
    }
}

/// Removes the sockets of terminals that no process waits for.
async fn remove_abandoned_sockets(shared: &Shared) {
    let state_dir = shared.config.state_dir.clone();
    let in_use: Vec<_> = shared
        .all_even_unfinished()
        .iter()
        .flat_map(|task| task.all_execs().into_iter().chain([Arc::clone(&task.init)]))
        .map(|process| process.fds.clone())
        .filter(|fds| fds.get(FdRole::Console).is_some())
        .collect();
    let removed = blocking(move || stdio::remove_abandoned(&state_dir, &in_use));
    if let Err(error) = removed.await {
        warn!(%error, "sockets of terminals that will not come are left");
    }
}

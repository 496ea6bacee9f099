//! A new daemon takes over what its predecessor left: records on disk, processes in the kernel,
//! mounts, descriptors. Owns the comparison of the two: the truth about a process is the kernel's,
//! about everything else the record's.
//!
//! A record can be one step behind or ahead of the container, so recovery has transitions of its
//! own beside those of the operations, all of them [`Lifecycle`](super::lifecycle::Lifecycle)'s:
//!
//! - `Create` cut short ([`half_created`]): `Created` → `Starting` → taken over, or removed.
//! - `Start` cut short ([`unfinished`]): `Created` → `Starting` → `Started` if the runtime has
//!   started it, else back to `Created`, or `StartFailed` if nothing tells.
//! - `Pause` and `Resume` cut short: the runtime says whether the container is frozen.

mod half_created;
mod loaded;
mod streams;
mod unfinished;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use tracing::{info, warn};

use crate::blocking::blocking;
use crate::clock::BootTime;
use crate::error::Error;
use crate::event::EventKind;
use crate::exit::{Adopted, Evidence, ExitRecord, ExitStatus, Known, UnknownReason};
use crate::fdstore::{FdName, FdRole, InheritedFds};
use crate::process::{Process, ProcessIdentity};
use crate::runtime::{InFlightCalls, Runtime};
use crate::stdio;
use crate::task::api::Exit;
use crate::task::context::RequestId;
use crate::task::engine::Engine;
use crate::task::lifecycle::{Lifecycle, Phase};
use crate::task::process::TaskProcess;
use crate::task::task::Task;
use loaded::LoadedTask;
use streams::reconnect;
use unfinished::Unfinished;

/// A process that is alive by its record.
struct RecordedProcess {
    identity: ProcessIdentity,
    pidfd: Option<OwnedFd>,
    task: Arc<Task>,
    process: Arc<TaskProcess>,
}

/// What is found out about all tasks, before anything is done about it.
#[derive(Default)]
struct Found {
    alive: Vec<RecordedProcess>,
    /// Of an earlier boot: how they ended is unknown.
    lost: Vec<RecordedProcess>,
    unfinished: Vec<Unfinished>,
}

impl Engine {
    /// Takes over everything in the store. Afterwards every task is there, and every exit that
    /// happened meanwhile is on its way.
    pub(in crate::task) async fn recover(
        self: &Arc<Self>,
        inherited: &mut InheritedFds,
    ) -> Result<(), Error> {
        let (store, descriptors) = (self.store.clone(), Arc::clone(&self.config.descriptors));
        // All of it in one go: a change of threads for each of 500 tasks would take longer than the
        // work.
        let loading = blocking(move || {
            let load = |record| {
                descriptors.start_goes_on();
                LoadedTask::of(record)
            };
            let loaded: Vec<LoadedTask> = store.load()?.into_iter().map(load).collect();
            Ok::<_, Error>(loaded)
        });
        let (loaded, calls) = tokio::join!(loading, blocking(InFlightCalls::find));
        let (loaded, mut calls) = (loaded??, calls?);
        let mut found = Found::default();
        for loaded in loaded {
            self.config.descriptors.start_goes_on();
            let calls = calls.take(&loaded.record.bundle.path);
            let is_of_this_boot = loaded.record.boot_id == self.boot_id;
            if let Some(task) = self.restore_task(loaded, &calls).await? {
                self.examine(&task, is_of_this_boot, calls, inherited, &mut found);
            }
        }
        self.adopt(&mut found.alive, found.unfinished).await?;
        self.take_left_client_ends(inherited);
        self.remove_abandoned_sockets().await;
        for lost in found.lost {
            self.conclude_lost(lost);
        }
        Ok(())
    }

    async fn restore_task(
        self: &Arc<Self>,
        loaded: LoadedTask,
        calls: &[Process],
    ) -> Result<Option<Arc<Task>>, Error> {
        let LoadedTask {
            record,
            traits,
            is_bundle_gone,
        } = loaded;
        let runtime = Runtime::new(
            &record.runtime,
            &record.key(),
            traits,
            self.config.runtime_deadline,
            self.reaper.clone(),
            self.calls.clone(),
        );
        let fds = |number| self.fds_of(number);
        let task = Arc::new(Task::restored(record, runtime, traits, fds));
        if task.is_complete() && calls.is_empty() && is_bundle_gone {
            warn!(
                id = %task.id(),
                "removing a dead task whose bundle is gone: no client can ask for it"
            );
            self.remove_traces(&task, true).await;
            return Ok(None);
        }
        self.registry.reserve(&task)?;
        Ok(Some(task))
    }

    /// Looks at one task: what of it is alive, what has ended, what is half done.
    fn examine(
        self: &Arc<Self>,
        task: &Arc<Task>,
        is_of_this_boot: bool,
        calls: Vec<Process>,
        inherited: &mut InheritedFds,
        found: &mut Found,
    ) {
        if !task.is_complete() {
            task.init.fds.inherit(inherited);
            self.finish_creation(Arc::clone(task), calls);
            return;
        }
        if !is_of_this_boot {
            warn!(id = %task.id(), "the task is of an earlier boot: its processes are gone");
        }
        let mut unfinished = Unfinished::of(task, calls);
        // Execs first, since the init's end is the last of its container.
        for process in task.all_execs().into_iter().chain([Arc::clone(&task.init)]) {
            process.fds.inherit(inherited);
            if let Some(exit) = process.now().exit() {
                self.take_up_ended(task, &process, exit);
            } else if is_of_this_boot {
                examine_process(task, process, &mut unfinished, found);
            } else {
                examine_lost(task, process, found);
            }
        }
        if is_of_this_boot && unfinished.is_something() {
            found.unfinished.push(unfinished);
        }
    }

    /// It ended and is not deleted: no client has acted on this exit, so perhaps none heard of it.
    fn take_up_ended(&self, task: &Arc<Task>, process: &Arc<TaskProcess>, exit: Exit) {
        if let Some(identity) = process.identity() {
            self.let_be_reaped(identity);
        }
        process.fds.remove(&[FdRole::Pidfd]);
        reconnect(&self.idle, task, process);
        if let Some(streams) = process.streams() {
            streams.end_of_process();
        }
        let exited = EventKind::Exited {
            exec: process.exec.clone(),
            pid: process.now().pid,
            exit_code: exit.code,
            exited_at: exit.at,
        };
        if process.exec.is_some() {
            self.emit(task, exited);
        } else {
            task.mark_init_ended();
            self.emit_init_exit(task, task.init_exited(exited));
        }
    }

    /// Takes the watches over, and lets unfinished work be finished.
    async fn adopt(
        self: &Arc<Self>,
        alive: &mut Vec<RecordedProcess>,
        unfinished: Vec<Unfinished>,
    ) -> Result<(), Error> {
        let known = alive.iter_mut().map(|recorded| Known {
            identity: recorded.identity,
            pidfd: recorded.pidfd.take(),
        });
        let adopted = self.monitor.adopt(known.collect()).await?;
        info!(processes = adopted.len(), "exit monitor resumed");
        // First: it keeps ends back that must not come before what they end.
        for unfinished in unfinished {
            unfinished.finish(self);
        }
        let mut living = Vec::new();
        for (recorded, adopted) in alive.drain(..).zip(adopted) {
            let (task, process) = (&recorded.task, &recorded.process);
            self.registry.track(recorded.identity, task, process);
            if let Adopted::Armed(alive) = &adopted {
                process.set_process(Arc::clone(alive));
                if process.exec.is_none() {
                    living.push(Arc::clone(task));
                }
            }
            reconnect(&self.idle, task, process);
            if let Adopted::Ended(record) = adopted {
                self.report_exit(task, process, record);
            }
        }
        self.watch_adopted_for_oom(living);
        Ok(())
    }

    /// Beside serving: it opens three files for each task. An OOM kill that none has watched for is
    /// told of afterwards, or before the exit it caused.
    fn watch_adopted_for_oom(self: &Arc<Self>, living: Vec<Arc<Task>>) {
        let engine = Arc::clone(self);
        let watching = blocking(move || {
            for task in &living {
                engine.watch_for_oom(task);
                // With its end its watch would have ended.
                if task.init.now().exit().is_some() {
                    engine.oom.unwatch(task.serial);
                }
            }
            living
        });
        let engine = Arc::clone(self);
        tokio::spawn(async move {
            for task in watching.await.unwrap_or_default() {
                engine.flush_oom(&task).await;
            }
        });
    }

    /// How a process of an earlier boot ended is unknown.
    fn conclude_lost(self: &Arc<Self>, lost: RecordedProcess) {
        let record = ExitRecord {
            process: lost.identity,
            status: ExitStatus::Unknown {
                reason: UnknownReason::Unwatched,
            },
            at: BootTime::now(),
            evidence: Evidence::None,
        };
        if let Some(record) = lost.process.report(record) {
            let engine = Arc::clone(self);
            tokio::spawn(async move {
                engine.conclude(&lost.task, &lost.process, record).await;
            });
        }
    }

    /// A predecessor has removed what was half created, and died before the request came again: its
    /// client still reads.
    fn take_left_client_ends(self: &Arc<Self>, inherited: &mut InheritedFds) {
        let numbers: Vec<u64> = inherited
            .counts()
            .filter_map(|(name, _)| match name {
                FdName::Process(number) => Some(number),
                FdName::Listener
                | FdName::SandboxListener
                | FdName::Intake
                | FdName::IntakeSender
                | FdName::Connection(_)
                | FdName::Answer(_) => None,
            })
            .collect();
        for number in numbers {
            let fds = self.fds_of(number);
            fds.inherit(inherited);
            let request = fds
                .left_to()
                .map(|(connection, stream)| RequestId { connection, stream });
            self.leave_client_ends(request, fds);
        }
    }

    /// Removes the sockets of terminals that no process waits for.
    async fn remove_abandoned_sockets(&self) {
        let state_dir = self.config.state_dir.clone();
        let in_use: Vec<_> = self
            .registry
            .all_even_unfinished()
            .iter()
            .flat_map(|task| task.all_execs().into_iter().chain([Arc::clone(&task.init)]))
            .map(|process| process.fds.clone())
            .filter(|fds| fds.get(FdRole::Console).is_some())
            .collect();
        let removed = blocking(move || stdio::remove_abandoned(&state_dir, &in_use));
        if let Err(error) = removed.await {
            warn!(%error, "cannot remove the sockets of terminals whose runtimes have ended");
        }
    }
}

impl RecordedProcess {
    fn new(identity: ProcessIdentity, task: &Arc<Task>, process: Arc<TaskProcess>) -> Self {
        let pidfd = process.fds.get(FdRole::Pidfd);
        Self {
            identity,
            pidfd: pidfd.and_then(|pidfd| pidfd.as_fd().try_clone_to_owned().ok()),
            task: Arc::clone(task),
            process,
        }
    }
}

/// Looks at a process of this boot whose end is not recorded.
fn examine_process(
    task: &Arc<Task>,
    process: Arc<TaskProcess>,
    unfinished: &mut Unfinished,
    found: &mut Found,
) {
    let now = process.now();
    let has_begun = process.start_mark().is_some();
    let is_exec = process.exec.is_some();
    if let Some(identity) = recorded_identity(&process) {
        enter_if_exec(task, &process);
        if is_exec && now.phase() == Phase::Created {
            unfinished.add_started_exec(Arc::clone(&process));
        }
        found
            .alive
            .push(RecordedProcess::new(identity, task, process));
    } else if is_exec && has_begun {
        unfinished.add_begun_exec(process);
    } else if has_begun {
        // A restore that was cut short: its client reads on.
        stdio::discard_pipes(&process.fds);
    } else {
        process.fds.remove_all();
    }
}

/// A process of an earlier boot whose end is not recorded.
fn examine_lost(task: &Arc<Task>, process: Arc<TaskProcess>, found: &mut Found) {
    let Some(identity) = recorded_identity(&process) else {
        return process.fds.remove_all();
    };
    enter_if_exec(task, &process);
    found
        .lost
        .push(RecordedProcess::new(identity, task, process));
}

/// Which process it was by its record, if it was started.
fn recorded_identity(process: &TaskProcess) -> Option<ProcessIdentity> {
    match process.now().lifecycle {
        Lifecycle::StartFailed { .. } => None,
        _ => process.identity(),
    }
}

fn enter_if_exec(task: &Task, process: &TaskProcess) {
    if process.exec.is_some() && task.enter_exec().is_err() {
        // The exec's end is only to be learned: the init's exit is emitted already.
        warn!(id = %task.id(), "an exec outlived its init");
    }
}

//! What a predecessor was doing when it died: finished if it has taken effect, left to be asked for
//! again if not, undone if it can be neither. Owns that no mutation of a task is done before that
//! (invariant 17): it holds the mutation locks of the processes concerned.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use crate::blocking::blocking;
use crate::clock::BootTime;
use crate::error::Error;
use crate::event::EventKind;
use crate::exit::{Evidence, ExitRecord, ExitStatus, UnknownReason};
use crate::fdstore::FdRole;
use crate::process::{OpenError, Process, ProcessIdentity};
use crate::runtime::wait_for;
use crate::stdio;
use crate::task::cut_short::Known;
use crate::task::engine::Engine;
use crate::task::exec_files::ExecFiles;
use crate::task::launch::read_pid;
use crate::task::lifecycle::{Phase, Transition};
use crate::task::process::TaskProcess;
use crate::task::recovery::streams::{connect, take_terminal};
use crate::task::restores::undo_restore;
use crate::task::task::Task;
use crate::task::teardown::end_logger;
use crate::task::unreported;

/// The time between two looks for the pid of an exec that a call in flight may have started.
const LOOK: Duration = Duration::from_millis(10);

/// The unfinished work of one task.
pub(super) struct Unfinished {
    task: Arc<Task>,
    /// Calls of the OCI runtime that still run.
    calls: Vec<Process>,
    /// Execs whose start has begun.
    begun: Vec<Arc<TaskProcess>>,
    /// Execs that run or have run, whose start was not answered.
    started: Vec<Arc<TaskProcess>>,
    /// The mutation locks of all of them and of the init.
    locks: Vec<OwnedSemaphorePermit>,
}

impl Unfinished {
    /// No work yet, but the init's mutation lock.
    pub(super) fn of(task: &Arc<Task>, calls: Vec<Process>) -> Self {
        Self {
            task: Arc::clone(task),
            calls,
            begun: Vec::new(),
            started: Vec::new(),
            locks: task.init.try_lock_mutations().into_iter().collect(),
        }
    }

    /// The start of this exec has begun. It may have an end already.
    pub(super) fn add_begun_exec(&mut self, exec: Arc<TaskProcess>) {
        self.hold_back(&exec);
        self.begun.push(exec);
    }

    /// This exec was seen to run. If its start were not emitted, the request that comes again would
    /// start it twice.
    pub(super) fn add_started_exec(&mut self, exec: Arc<TaskProcess>) {
        self.hold_back(&exec);
        self.started.push(exec);
    }

    fn hold_back(&mut self, exec: &Arc<TaskProcess>) {
        if let Err(error) = exec.begin() {
            debug!(id = %self.task.id(), exec_id = ?exec.exec, %error, "cannot begin the start of an exec: it is over");
        }
        self.locks.extend(exec.try_lock_mutations());
    }

    /// Whether there is anything to finish.
    pub(super) fn is_something(&self) -> bool {
        let phase = self.task.init.now().phase();
        !self.calls.is_empty()
            || !self.begun.is_empty()
            || !self.started.is_empty()
            || self.task.is_checkpointing()
            || matches!(phase, Phase::Created | Phase::Pausing | Phase::Paused)
    }

    /// Finishes it, in a task of its own.
    pub(super) fn finish(self, engine: &Arc<Engine>) {
        let (engine, mutation) = (Arc::clone(engine), engine.mutation());
        if self.task.init.now().phase() == Phase::Created
            && let Err(error) = self.task.init.begin()
        {
            // The start of the init comes before its end, whenever that was.
            debug!(id = %self.task.id(), %error, "cannot begin the start of an init: it is over");
        }
        tokio::spawn(async move {
            engine.finish_work(&self).await;
            drop((self, mutation));
        });
    }
}

impl Engine {
    async fn finish_work(self: &Arc<Self>, work: &Unfinished) {
        let task = &work.task;
        let calls = wait_for(&work.calls, self.config.runtime_deadline);
        let watched = self.watch_early(task, &work.begun, calls).await;
        if task.is_checkpointing() {
            self.end_left_checkpoint(task).await;
        }
        self.agree_on_phase(task).await;
        for process in &work.started {
            self.finish_started_exec(task, process).await;
        }
        for (exec, is_watched) in work.begun.iter().zip(watched) {
            if let Err(error) = self.finish_exec(task, exec, is_watched).await {
                if let Some(unwatched) = exec.process() {
                    // It runs, but its end would never be learned: it must not go on.
                    let _ = unwatched.signal(libc::SIGKILL);
                }
                warn!(
                    id = %task.id(), exec_id = ?exec.exec, %error,
                    "cannot finish the start of an exec"
                );
                exec.fds.remove_all();
                self.release_exit(task, exec);
                self.emit_init_exit(task, task.leave_exec());
            }
        }
    }

    async fn finish_started_exec(self: &Arc<Self>, task: &Arc<Task>, process: &Arc<TaskProcess>) {
        let Some(exec) = process.exec.clone() else {
            return;
        };
        if process.fds.get(FdRole::Console).is_some() {
            take_terminal(task, process).await;
            process.decide_stdin();
            connect(&self.idle, task, process);
        }
        if let Err(error) = self.complete_exec_start(task, process, &exec).await {
            warn!(
                id = %task.id(), exec_id = %exec, %error,
                "cannot store that an exec was started"
            );
        }
    }

    /// The record may be one step behind the container: then the runtime knows. The init's end, if
    /// it came, is let go afterwards.
    async fn agree_on_phase(self: &Arc<Self>, task: &Arc<Task>) {
        let init = &task.init;
        let recorded = init.now().phase();
        if init.identity().is_none() {
            undo_restore(task).await;
        } else if matches!(recorded, Phase::Created | Phase::Pausing | Phase::Paused) {
            let known = match Known::of(task).await {
                Ok(known) => known.phase(),
                Err(error) => {
                    warn!(
                        id = %task.id(), %error,
                        "cannot ask the runtime for the container's state"
                    );
                    None
                }
            };
            if let Some((change, event)) = change_by(task, recorded, known)
                && init.advance(change)
            {
                init.begin_input();
                let phase = init.now().phase();
                info!(
                    namespace = %task.key.namespace, id = %task.id(), ?phase,
                    "a predecessor has completed an operation"
                );
                if let Some(event) = event {
                    self.emit(task, event);
                }
                self.save_or_warn(task).await;
            } else if known == Some(Phase::Created) && init.early_exit().is_some() {
                // It has ended by the runtime's own code: the request that comes again is not told
                // that it was started.
                init.unmark_start();
                self.save_or_warn(task).await;
            }
        }
        self.release_exit(task, init);
    }

    async fn save_or_warn(&self, task: &Arc<Task>) {
        if let Err(error) = self.save(task).await {
            warn!(id = %task.id(), %error, "cannot store a container's state");
        }
    }

    /// Watches execs whose pid the runtime has written, while its calls go on: a hook or a wrapper
    /// can keep a call for long, and the process that inherits the exec's reaps it meanwhile.
    /// Answers of each whether it is watched when the calls have ended.
    async fn watch_early(
        &self,
        task: &Arc<Task>,
        execs: &[Arc<TaskProcess>],
        calls: impl Future<Output = ()>,
    ) -> Vec<bool> {
        let mut calls = pin!(calls);
        let mut watched = vec![false; execs.len()];
        loop {
            for (process, is_watched) in execs.iter().zip(&mut watched) {
                if *is_watched {
                    continue;
                }
                match self.watch_if_begun(task, process).await {
                    Ok(is_begun) => *is_watched = is_begun,
                    // It is tried again, and given up when the call has ended.
                    Err(error) => debug!(
                        id = %task.id(), exec_id = ?process.exec, %error,
                        "cannot watch an exec: trying again"
                    ),
                }
            }
            let is_all = watched.iter().all(|is_watched| *is_watched);
            let limit = if is_all { Duration::MAX } else { LOOK };
            if timeout(limit, calls.as_mut()).await.is_ok() {
                return watched;
            }
        }
    }

    /// Watches an exec if the runtime has written its pid; false if it has not, or if it has ended
    /// and is gone.
    async fn watch_if_begun(
        &self,
        task: &Arc<Task>,
        process: &Arc<TaskProcess>,
    ) -> Result<bool, Error> {
        let Some(exec) = &process.exec else {
            return Ok(true);
        };
        let files = ExecFiles::new(&task.bundle.path, exec);
        let Ok(pid) = read_pid(&files.pid).await else {
            return Ok(false);
        };
        let Some(opened) = open_member(task, pid).await? else {
            return Ok(false);
        };
        self.watch_found(task, process, opened).await?;
        Ok(true)
    }

    async fn watch_found(
        &self,
        task: &Arc<Task>,
        process: &Arc<TaskProcess>,
        opened: Process,
    ) -> Result<(), Error> {
        process.note_pipes();
        let identity = opened.identity();
        let watched = self.watch(task, process, Arc::new(opened)).await;
        if watched.is_err() {
            self.registry.untrack(identity);
        }
        watched
    }

    /// The runtime tells by the pid file whether it has started the exec. One that was never called
    /// has not; of one that was killed before it reported, the process is looked for.
    async fn finish_exec(
        self: &Arc<Self>,
        task: &Arc<Task>,
        process: &Arc<TaskProcess>,
        is_watched: bool,
    ) -> Result<(), Error> {
        let Some(exec) = process.exec.clone() else {
            return Ok(());
        };
        let files = ExecFiles::new(&task.bundle.path, &exec);
        let begun = match read_pid(&files.pid).await {
            Ok(pid) => Begun::Told(pid),
            Err(_) if !files.may_have_begun().await => {
                stdio::discard_pipes(&process.fds);
                end_logger(process).await;
                self.release_exit(task, process);
                return Ok(());
            }
            Err(_) => match unreported::find(task, process).await {
                Some(found) => Begun::Found(found),
                None => return self.refuse_further_starts(task, process, &files).await,
            },
        };
        if task.enter_exec().is_err() {
            warn!(id = %task.id(), exec_id = %exec, "an exec outlived its init");
        }
        match begun {
            Begun::Found(found) => self.watch_found(task, process, found).await?,
            Begun::Told(_) if is_watched || self.watch_if_begun(task, process).await? => {}
            // Its zombie is gone: the process that inherited it has reaped it.
            Begun::Told(pid) => {
                let _ = process.report(self.end_of_reaped(process, &files, pid).await);
            }
        }
        take_terminal(task, process).await;
        process.note_pipes();
        process.decide_stdin();
        connect(&self.idle, task, process);
        let started = self.complete_exec_start(task, process, &exec).await;
        // Its record names it now.
        files.remove().await;
        started
    }

    /// The end of an exec that has ended and is gone. Its identity is made from what the fd store's
    /// process and the exec's files say, since there is no process left to open (the exception of
    /// invariant 1).
    async fn end_of_reaped(
        &self,
        process: &TaskProcess,
        files: &ExecFiles,
        pid: i32,
    ) -> ExitRecord {
        let known = match files.beginning().await {
            Some(times) => {
                self.reaped_by_store(pid, |start| times.contains(&start))
                    .await
            }
            None => None,
        };
        let unknown = ExitStatus::Unknown {
            reason: UnknownReason::Unwatched,
        };
        let (start_ticks, status) = known.unwrap_or((0, unknown));
        let identity = ProcessIdentity {
            pid,
            start_ticks,
            inode: None,
        };
        process.set_identity(identity);
        ExitRecord {
            process: identity,
            status,
            at: BootTime::now(),
            evidence: known.map_or(Evidence::None, |_| Evidence::Wait),
        }
    }

    /// It may have run and ended: it is not started again, and who waits for it gets an answer
    /// (invariant 20).
    async fn refuse_further_starts(
        &self,
        task: &Arc<Task>,
        process: &Arc<TaskProcess>,
        files: &ExecFiles,
    ) -> Result<(), Error> {
        warn!(
            id = %task.id(), exec_id = ?process.exec,
            "an exec may have run: its runtime was killed before it reported a pid"
        );
        process.fail_as_maybe_run();
        // Before the files go which say the same.
        let saved = self.save(task).await;
        files.remove().await;
        end_logger(process).await;
        saved.map(drop)
    }
}

/// How it is known that an exec has begun.
enum Begun {
    /// The runtime has written its pid.
    Told(i32),
    Found(Process),
}

/// What has happened to the container since its record was written, by what is known of it now.
fn change_by(
    task: &Task,
    recorded: Phase,
    known: Option<Phase>,
) -> Option<(Transition, Option<EventKind>)> {
    let started = EventKind::Started {
        pid: task.init.now().pid,
    };
    match (recorded, known?) {
        (Phase::Created, Phase::Running) => Some((Transition::Start, Some(started))),
        // It has ended, and so it ran, or was killed while it was being started.
        (Phase::Created, Phase::Stopped) if task.init.start_mark().is_some() => {
            Some((Transition::Start, Some(started)))
        }
        (Phase::Pausing, Phase::Paused) => Some((Transition::Frozen, Some(EventKind::Paused))),
        (Phase::Pausing, Phase::Running) => Some((Transition::Thawed, None)),
        (Phase::Paused, Phase::Running) => Some((Transition::Thawed, Some(EventKind::Resumed))),
        _ => None,
    }
}

/// The process that the pid file names; `None` if the number is another's by now, or free.
async fn open_member(task: &Task, pid: i32) -> Result<Option<Process>, Error> {
    let process = match Process::open(pid) {
        Err(OpenError::Gone { .. }) => return Ok(None),
        Err(error) => return Err(Error::Internal(format!("cannot watch an exec: {error}"))),
        Ok(process) => process,
    };
    let Some(cgroup) = task.cgroup() else {
        return Ok(Some(process));
    };
    let members = blocking(move || cgroup.pids()).await?.unwrap_or_default();
    // A zombie's cgroup may be forgotten already, but its number is not free. It can have ended
    // since we looked.
    let is_its = members.contains(&pid) || process.has_ended().unwrap_or(true);
    Ok(is_its.then_some(process))
}

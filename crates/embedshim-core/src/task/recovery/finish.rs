//! What a predecessor was about when it died: finished if it has taken effect, left to be asked for
//! again if not, undone if it cannot be either. Owns that nothing else is done to a task before
//! that: it holds the turns of the processes concerned.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use crate::clock::BootTime;
use crate::error::Error;
use crate::event::EventKind;
use crate::exit::{Evidence, ExitRecord, ExitStatus, UnknownReason};
use crate::fdstore::FdRole;
use crate::process::{OpenError, Process, ProcessIdentity};
use crate::runtime::{State, wait_for};
use crate::stdio::{self, ConsoleSocket, Plan, Streams};
use crate::task::detached::blocking;
use crate::task::engine::Shared;
use crate::task::exits;
use crate::task::launch::{CONSOLE_DEADLINE, end_logger, read_pid};
use crate::task::lifecycle::Phase;
use crate::task::ops::start::{ExecFiles, exec_started};
use crate::task::process::TaskProcess;
use crate::task::recovery::unreported;
use crate::task::task::Task;

/// The time between two looks for the pid of an exec that a call under way may have started.
const LOOK: Duration = Duration::from_millis(10);

/// One task's unfinished business.
pub(in crate::task) struct Unfinished {
    task: Arc<Task>,
    /// Calls of the OCI runtime that still run.
    calls: Vec<Process>,
    /// Execs that somebody has begun to start.
    execs: Vec<Arc<TaskProcess>>,
    /// Execs that run or have run, which nobody has been told.
    untold: Vec<Arc<TaskProcess>>,
    /// Whose turns are held.
    turns: Vec<OwnedSemaphorePermit>,
}

impl Unfinished {
    /// Nothing yet, but nobody else's turn.
    pub(in crate::task) fn of(task: &Arc<Task>, calls: Vec<Process>) -> Self {
        Self {
            task: Arc::clone(task),
            calls,
            execs: Vec::new(),
            untold: Vec::new(),
            turns: task.init.turn_now().into_iter().collect(),
        }
    }

    /// The start of this exec, which may have an end already.
    pub(in crate::task) fn exec(&mut self, exec: Arc<TaskProcess>) {
        exec.starting();
        self.turns.extend(exec.turn_now());
        self.execs.push(exec);
    }

    /// This exec was seen to run. Were it not told to be started, the request that comes again
    /// would start it twice.
    pub(in crate::task) fn untold_exec(&mut self, exec: Arc<TaskProcess>) {
        exec.starting();
        self.turns.extend(exec.turn_now());
        self.untold.push(exec);
    }

    /// Whether there is anything to finish.
    pub(in crate::task) fn is_something(&self) -> bool {
        let phase = self.task.init.now().phase;
        !self.calls.is_empty()
            || !self.execs.is_empty()
            || !self.untold.is_empty()
            || matches!(phase, Phase::Created | Phase::Pausing | Phase::Paused)
    }

    /// Finishes it, in a task of its own.
    pub(in crate::task) fn finish(self, shared: &Arc<Shared>) {
        let (shared, work) = (Arc::clone(shared), shared.work());
        if self.task.init.now().phase == Phase::Created {
            // The start of the init comes before its end, whenever that was.
            self.task.init.starting();
        }
        tokio::spawn(async move {
            let calls = wait_for(&self.calls, shared.config.runtime_deadline);
            let watched = watch_early(&shared, &self.task, &self.execs, calls).await;
            agree_on_phase(&shared, &self.task).await;
            for process in self.untold {
                let Some(exec) = process.exec.clone() else {
                    continue;
                };
                if process.fds.get(FdRole::Console).is_some() {
                    take_terminal(&self.task, &process).await;
                    process.decide_stdin();
                    connect(&self.task, &process);
                }
                if let Err(error) = exec_started(&shared, &self.task, &process, &exec).await {
                    warn!(id = %self.task.id(), exec_id = %exec, %error, "that an exec was started is not durable");
                }
            }
            for (exec, is_watched) in self.execs.into_iter().zip(watched) {
                if let Err(error) = finish_exec(&shared, &self.task, &exec, is_watched).await {
                    if let Some(unwatched) = exec.process() {
                        // It runs, but its end would never be learned: it must not go on.
                        let _ = unwatched.signal(libc::SIGKILL);
                    }
                    warn!(id = %self.task.id(), exec_id = ?exec.exec, %error, "an exec's start cannot be finished");
                    exec.fds.forget_all();
                    exits::release_early(&shared, &self.task, &exec);
                    self.task.leave_exec(&shared);
                }
            }
            drop((self.turns, work));
        });
    }
}

/// The record may be one step behind the container: then the runtime knows. The init's end, if it
/// came, is let go afterwards.
async fn agree_on_phase(shared: &Arc<Shared>, task: &Arc<Task>) {
    let init = &task.init;
    let recorded = init.now().phase;
    if init.identity().is_none() {
        undo_restore(task).await;
    } else if matches!(recorded, Phase::Created | Phase::Pausing | Phase::Paused) {
        let known = task.runtime.state(task.id(), &task.log()).await;
        let known = known.unwrap_or_else(|error| {
            warn!(id = %task.id(), %error, "cannot ask the runtime for the container's state");
            State::default()
        });
        let started = EventKind::Started {
            pid: init.now().pid,
        };
        let change = match (recorded, known.status.as_str()) {
            (Phase::Created, "running") => Some((Phase::Running, Some(started))),
            // It has ended, and so it ran, or was killed while it was being started.
            (Phase::Created, "stopped") if init.start_mark().is_some() => {
                Some((Phase::Running, Some(started)))
            }
            (Phase::Pausing, "paused") => Some((Phase::Paused, Some(EventKind::Paused))),
            (Phase::Pausing, "running") => Some((Phase::Running, None)),
            (Phase::Paused, "running") => Some((Phase::Running, Some(EventKind::Resumed))),
            _ => None,
        };
        if let Some((phase, told)) = change
            && init.advance(recorded, phase)
        {
            init.begin_input();
            info!(namespace = %task.key.namespace, id = %task.id(), ?phase, "a predecessor has done this");
            if let Some(told) = told {
                shared.emit(task, told);
            }
            if let Err(error) = task.save(shared).await {
                warn!(id = %task.id(), %error, "a container's state is not durable");
            }
        }
    }
    exits::release_early(shared, task, init);
}

/// A restore that was cut short: whatever there is of it has never been told of, nor is watched.
async fn undo_restore(task: &Arc<Task>) {
    let is_half_done = task.init.start_mark().is_some() && task.checkpoint.is_some();
    if !is_half_done {
        return;
    }
    if let Err(error) = task.runtime.delete(task.id(), true, &task.log()).await {
        warn!(id = %task.id(), %error, "cannot delete a container that was half restored");
    }
    task.init.unmark_start();
    task.init.unmake();
}

/// Watches execs whose pid the runtime has written, while its calls go on: a hook or a wrapper can
/// keep a call for long, and who inherits the exec's process reaps it meanwhile. Tells of each
/// whether it is watched when the calls have ended.
async fn watch_early(
    shared: &Arc<Shared>,
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
            match watch_if_begun(shared, task, process).await {
                Ok(is_begun) => *is_watched = is_begun,
                // It is tried again, and given up when the call has ended.
                Err(error) => {
                    debug!(id = %task.id(), exec_id = ?process.exec, %error, "cannot watch an exec yet");
                }
            }
        }
        let is_all = watched.iter().all(|is_watched| *is_watched);
        let limit = if is_all { Duration::MAX } else { LOOK };
        if timeout(limit, calls.as_mut()).await.is_ok() {
            return watched;
        }
    }
}

/// Watches an exec if the runtime has written its pid; false if it has not, or if it has ended and
/// is gone.
async fn watch_if_begun(
    shared: &Arc<Shared>,
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
    let Some(opened) = open(task, pid).await? else {
        return Ok(false);
    };
    watch(shared, task, process, opened).await?;
    Ok(true)
}

async fn watch(
    shared: &Arc<Shared>,
    task: &Arc<Task>,
    process: &Arc<TaskProcess>,
    opened: Process,
) -> Result<(), Error> {
    process.note_pipes();
    let identity = opened.identity();
    let watched = shared.watch(task, process, Arc::new(opened)).await;
    if watched.is_err() {
        shared.disown(identity);
    }
    watched
}

/// How it is known that an exec has begun.
enum Begun {
    /// The runtime has written its pid.
    Told(i32),
    Found(Process),
}

/// The runtime tells by the pid file whether it has started the exec. One that was never called has
/// not; of one that was killed before it told, the process is looked for.
async fn finish_exec(
    shared: &Arc<Shared>,
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
            exits::release_early(shared, task, process);
            return Ok(());
        }
        Err(_) => match unreported::find(task, process).await {
            Some(found) => Begun::Found(found),
            None => return may_have_run(shared, task, process, &files).await,
        },
    };
    if task.enter_exec().is_err() {
        warn!(id = %task.id(), exec_id = %exec, "an exec outlived its init");
    }
    match begun {
        Begun::Found(found) => watch(shared, task, process, found).await?,
        Begun::Told(_) if is_watched || watch_if_begun(shared, task, process).await? => {}
        // Its zombie is gone: whoever inherited it has reaped it.
        Begun::Told(pid) => {
            let _ = process.hold(end_of_reaped(shared, process, &files, pid).await);
        }
    }
    take_terminal(task, process).await;
    process.note_pipes();
    process.decide_stdin();
    connect(task, process);
    let started = exec_started(shared, task, process, &exec).await;
    // Its record names it now.
    files.remove().await;
    started
}

/// The end of an exec that has ended and is gone.
async fn end_of_reaped(
    shared: &Shared,
    process: &TaskProcess,
    files: &ExecFiles,
    pid: i32,
) -> ExitRecord {
    let known = match files.beginning().await {
        Some(times) => exits::reaped_by_store(shared, pid, |start| times.contains(&start)).await,
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
    process.ran_as(identity);
    ExitRecord {
        process: identity,
        status,
        at: BootTime::now(),
        evidence: known.map_or(Evidence::None, |_| Evidence::Wait),
    }
}

/// It may have run and ended: it is not started again, and who waits for it is let go.
async fn may_have_run(
    shared: &Arc<Shared>,
    task: &Arc<Task>,
    process: &Arc<TaskProcess>,
    files: &ExecFiles,
) -> Result<(), Error> {
    warn!(id = %task.id(), exec_id = ?process.exec, "an exec may have run: its runtime was killed before it told");
    process.may_have_run();
    // Before the files go which say the same.
    let saved = task.save(shared).await;
    files.remove().await;
    end_logger(process).await;
    saved
}

/// The process that the pid file names; `None` if the number is another's by now, or nobody's.
async fn open(task: &Task, pid: i32) -> Result<Option<Process>, Error> {
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

/// Takes the terminal that the runtime has handed over, or will, to the socket that a predecessor
/// has left.
pub(in crate::task) async fn take_terminal(task: &Task, process: &TaskProcess) {
    let taken = match ConsoleSocket::resume(&process.fds) {
        None => Ok(()),
        Some(Err(source)) => Err(Error::Internal(source.to_string())),
        Some(Ok(socket)) => socket.accept(CONSOLE_DEADLINE).await.map_err(Error::from),
    };
    if let Err(error) = taken {
        warn!(id = %task.id(), exec_id = ?process.exec, %error, "cannot take the terminal of an exec");
    }
}

/// Lets the streams of a process flow again, which is alive or has ended. What has to be found
/// first, on file systems that may not answer, is found in a task of its own.
pub(in crate::task) fn reconnect(task: &Arc<Task>, process: &Arc<TaskProcess>) {
    let (pipes, _) = process.pipes();
    if process.exec.is_none() && !pipes.is_empty() && !Streams::has_any(&process.fds) {
        let (task, process) = (Arc::clone(task), Arc::clone(process));
        tokio::spawn(async move {
            find_pipes(&task, &process).await;
            connect(&task, &process);
        });
        return;
    }
    connect(task, process);
}

pub(in crate::task) fn connect(task: &Task, process: &TaskProcess) {
    let is_lost = process.stdio.terminal && process.fds.get(FdRole::Terminal).is_none();
    if is_lost && process.now().exit.is_none() {
        warn!(id = %task.id(), exec_id = ?process.exec, "its terminal is lost: it went with the daemon that held it");
    }
    if !Streams::has_any(&process.fds) {
        return;
    }
    process.connect(Streams::start(&process.fds, process.kind(), task.id()));
    if process.exec.is_some() || process.stdio.terminal || process.now().phase != Phase::Created {
        process.begin_input();
    }
}

/// Daemon and store have ended together: what the init has written meanwhile is in its pipes.
async fn find_pipes(task: &Task, process: &TaskProcess) {
    let (Some(identity), None) = (process.identity(), process.now().exit) else {
        return;
    };
    let (pipes, is_stdin_closed) = process.pipes();
    let fds = process.fds.clone();
    let found = async {
        let plan = Plan::parse(&process.stdio)?;
        let found = move || stdio::find_again(&plan, pipes, identity, is_stdin_closed, &fds);
        blocking(found).await??;
        Ok::<_, Error>(())
    };
    if let Err(error) = found.await {
        warn!(id = %task.id(), %error, "cannot go on with the streams of a container");
    }
}

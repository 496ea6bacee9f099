//! `Start`, of the init and of execs. Owns that a started process is watched before its end can be
//! missed (invariant 2), and that the request that started it gets the same answer again
//! (invariant 16).

use std::path::Path;
use std::sync::Arc;

use tracing::{debug, info, warn};

use crate::error::Error;
use crate::event::EventKind;
use crate::failpoint;
use crate::id::{ExecId, ProcessKey};
use crate::runtime::Exec;
use crate::stdio::Plan;
use crate::task::context::{RequestContext, RequestId};
use crate::task::cut_short;
use crate::task::engine::Engine;
use crate::task::exec_files::ExecFiles;
use crate::task::launch::{open_reported, read_pid};
use crate::task::lifecycle::{Operation, Phase, Transition};
use crate::task::process::TaskProcess;
use crate::task::record::FailedStart;
use crate::task::task::Task;
use crate::task::teardown::end_logger;
use crate::task::unreported;

impl Engine {
    /// Starts the init or an exec.
    pub(in crate::task) async fn start(
        self: Arc<Self>,
        key: ProcessKey,
        context: RequestContext,
    ) -> Result<u32, Error> {
        if key.exec.is_some() && !context.is_replay {
            // Before anything about the exec itself, as runc-v2 does (containerd e7357916b).
            self.registry.task(&key.task)?.admit_exec_start()?;
        }
        let (task, process) = self.registry.process(&key)?;
        let _mutation = process.lock_mutations().await?;
        if process.was_started_by(&context) {
            return Ok(process.now().pid);
        }
        if let Some(refused) = process.refusal_of(&context) {
            return Err(refused);
        }
        match process.exec.clone() {
            None => self.start_init(&task, context.request).await,
            Some(exec) => {
                self.start_exec(&task, &process, &exec, context.request)
                    .await
            }
        }
    }

    async fn start_init(
        self: &Arc<Self>,
        task: &Arc<Task>,
        request: Option<RequestId>,
    ) -> Result<u32, Error> {
        let init = &task.init;
        init.begin()?;
        if init.start_mark().is_none() {
            init.decide_stdin();
        }
        init.mark_start(request);
        if let Err(error) = self.save(task).await {
            init.unmark_start();
            self.release_exit(task, init);
            return Err(error);
        }
        let result = if task.checkpoint.is_some() {
            self.restore_container(task).await
        } else {
            init.begin_input();
            start_by_runtime(task).await
        };
        match result {
            Ok(()) => {
                init.advance(Transition::Start);
                let pid = init.now().pid;
                self.emit(task, EventKind::Started { pid });
                info!(namespace = %task.key.namespace, id = %task.id(), pid, "started");
            }
            Err(_) => init.unmark_start(),
        }
        // After a crash before this, recovery asks the runtime about a process that was marked and
        // is not recorded as running.
        let saved = self.save(task).await;
        self.release_exit(task, init);
        result?;
        saved?;
        Ok(init.now().pid)
    }

    async fn start_exec(
        self: &Arc<Self>,
        task: &Arc<Task>,
        process: &Arc<TaskProcess>,
        exec: &ExecId,
        request: Option<RequestId>,
    ) -> Result<u32, Error> {
        process.now().lifecycle.admit(Operation::Start)?;
        process.admit_first_start()?;
        task.enter_exec()?;
        if let Err(refused) = process.begin() {
            self.emit_init_exit(task, task.leave_exec());
            return Err(refused);
        }
        process.mark_start(request);
        let files = ExecFiles::new(&task.bundle.path, exec);
        match self.run_exec(task, process, &files).await {
            Ok(pid) => {
                files.remove().await;
                self.complete_exec_start(task, process, exec).await?;
                Ok(pid)
            }
            Err(error) => {
                let failed = FailedStart::new(request, &error);
                self.undo_exec_start(task, process, exec, &files, failed)
                    .await;
                Err(error)
            }
        }
    }

    async fn run_exec(
        self: &Arc<Self>,
        task: &Arc<Task>,
        process: &Arc<TaskProcess>,
        files: &ExecFiles,
    ) -> Result<u32, Error> {
        let plan = Plan::parse(&process.stdio)?;
        let spec = process
            .spec()
            .ok_or_else(|| Error::Internal("the exec has no process document".into()))?;
        files.prepare(spec).await?;
        self.save(task).await?;
        // Until the exec is watched, no orphan is reaped: it might be the exec, ended already.
        let _guard = self.reaper.guard();
        let run = async |input, console_socket: Option<&Path>| {
            let call = Exec {
                id: task.id(),
                process: &files.process,
                pid_file: &files.pid,
                mark: &files.mark,
                console_socket,
                log: &files.log,
            };
            task.runtime.exec(&call, input).await
        };
        let streams = self.with_streams(task, process, &plan, run).await?;
        let opened = Arc::new(open_reported(read_pid(&files.pid).await?)?);
        process.connect(streams);
        process.begin_input();
        self.watch(task, process, opened).await?;
        Ok(process.now().pid)
    }

    /// It runs and is watched: everything that follows from that.
    pub(in crate::task) async fn complete_exec_start(
        self: &Arc<Self>,
        task: &Arc<Task>,
        process: &Arc<TaskProcess>,
        exec: &ExecId,
    ) -> Result<(), Error> {
        process.advance(Transition::Start);
        process.forget_spec();
        let (exec, pid) = (exec.clone(), process.now().pid);
        debug!(
            namespace = %task.key.namespace, id = %task.id(), exec_id = %exec, pid,
            "exec started"
        );
        self.emit(task, EventKind::ExecStarted { exec, pid });
        let saved = self.save(task).await;
        self.release_exit(task, process);
        saved.map(drop)
    }

    /// Its start has failed, perhaps after the runtime has started it: what runs must not go on,
    /// since its end would never be learned.
    async fn undo_exec_start(
        &self,
        task: &Arc<Task>,
        process: &Arc<TaskProcess>,
        exec: &ExecId,
        files: &ExecFiles,
        failed: FailedStart,
    ) {
        failpoint::step("before an exec whose start is refused is ended");
        if process.identity().is_none() {
            kill_unwatched(task, process, files).await;
        }
        if let Some(identity) = process.identity() {
            self.registry.untrack(identity);
            if let Some(unwatched) = process.process() {
                let _ = unwatched.signal(libc::SIGKILL);
            }
        }
        process.note_failed_start(failed);
        match self.save(task).await {
            // Not before: until then they say whether it may have run.
            Ok(_) => files.remove().await,
            Err(unsaved) => warn!(
                id = %task.id(), exec_id = %exec, error = %unsaved,
                "cannot store that an exec could not be started"
            ),
        }
        // Not before it is durable that its request is refused (invariant 16).
        process.fail_start();
        // First: the init's exit may wait for this, and a logger may take its 12 s.
        self.emit_init_exit(task, task.leave_exec());
        end_logger(process).await;
    }
}

/// Calls the runtime. One that was killed may have started the init: then the start is done.
async fn start_by_runtime(task: &Arc<Task>) -> Result<(), Error> {
    let init = task.init.process();
    let started = task.runtime.start(task.id(), init, &task.log()).await;
    let Err(error) = started else { return Ok(()) };
    match cut_short::phase_after(task, &error).await {
        // It has ended, and so it ran.
        Some(Phase::Running | Phase::Stopped) => {
            warn!(id = %task.id(), %error, "it was started all the same");
            Ok(())
        }
        _ => Err(error),
    }
}

/// Kills a process that the runtime has started, and of which nothing but its files tells.
async fn kill_unwatched(task: &Arc<Task>, process: &Arc<TaskProcess>, files: &ExecFiles) {
    let started = match read_pid(&files.pid).await {
        Ok(pid) => open_reported(pid).ok(),
        Err(_) if files.may_have_begun().await => unreported::find(task, process).await,
        Err(_) => None,
    };
    if let Some(started) = started {
        let pid = started.identity().pid;
        debug!(id = %task.id(), pid, "ending an exec whose start is refused");
        let _ = started.signal(libc::SIGKILL);
    }
}

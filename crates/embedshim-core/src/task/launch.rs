//! What `Create`, `Start` and recovery have in common: the streams of a process, the call of the
//! runtime that makes it, its pid, its cgroup. Owns the order in which a process gets its streams
//! before the runtime is called; never decides whether it is to be started.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tracing::warn;

use crate::blocking::blocking;
use crate::cgroup::Cgroup;
use crate::error::Error;
use crate::process::Process;
use crate::runtime::{Create, Input, Restore};
use crate::stdio::{self, ConsoleSocket, LoggedProcess, LoggerPipes, Plan, Streams};
use crate::task::engine::Engine;
use crate::task::process::TaskProcess;
use crate::task::task::Task;

/// Where CRIU writes its logs, and mounts what it needs meanwhile.
pub(in crate::task) const CRIU_WORK: &str = "criu-work";
/// How long a runtime that says it has started a terminal may take to hand it over.
pub(in crate::task) const CONSOLE_DEADLINE: Duration = Duration::from_secs(10);

impl Engine {
    /// Lets the runtime make the container, from its bundle or its checkpoint, and watches the
    /// init.
    pub(in crate::task) async fn launch(
        self: &Arc<Self>,
        task: &Arc<Task>,
        plan: &Plan,
    ) -> Result<(), Error> {
        // Until the init is watched, no orphan is reaped: it might be the init.
        let _guard = self.reaper.guard();
        let pid_file = task.pid_file();
        let stale = [task.pid_draft(), pid_file.clone()];
        blocking(move || stale.map(|file| std::fs::remove_file(file).is_ok())).await?;
        let work = task.bundle.path.join(CRIU_WORK);
        let log = task.log();
        let call = Create {
            id: task.id(),
            bundle: &task.bundle.path,
            pid_file: &pid_file,
            console_socket: None,
            log: &log,
            no_pivot_root: false,
            no_new_keyring: false,
        };
        let run = async |input, console_socket: Option<&Path>| {
            let create = Create {
                console_socket,
                ..call.clone()
            };
            let Some(image) = &task.checkpoint else {
                return task.runtime.create(&create, input).await;
            };
            let restore = Restore {
                create: &create,
                image,
                work: &work,
            };
            task.runtime.restore(&restore, input).await
        };
        let streams = self.with_streams(task, &task.init, plan, run).await?;
        let process = Arc::new(open_reported(read_pid(&pid_file).await?)?);
        let pid = process.identity().pid;
        task.init.connect(streams);
        if task.checkpoint.is_some() || plan.terminal() {
            task.init.begin_input();
        }
        task.set_cgroup(find_cgroup(pid).await);
        self.watch(task, &task.init, process).await?;
        self.watch_for_oom(task);
        Ok(())
    }

    /// Makes a process's streams, lets `call` run the runtime with them, and lets them flow if that
    /// succeeds. If it fails they stay until that is decided: a successor may find that the process
    /// was made, and take it over with them.
    pub(in crate::task) async fn with_streams(
        &self,
        task: &Task,
        process: &TaskProcess,
        plan: &Plan,
        call: impl AsyncFnOnce(Input, Option<&Path>) -> Result<(), Error>,
    ) -> Result<Streams, Error> {
        let logger = self.start_logger(task, process, plan).await?;
        if plan.terminal() {
            self.with_terminal(process, plan, logger, call).await?;
        } else {
            with_pipes(task, process, plan, logger, call).await?;
        }
        Ok(Streams::start(
            &process.fds,
            process.kind(),
            &self.idle,
            task.id(),
        ))
    }

    async fn with_terminal(
        &self,
        process: &TaskProcess,
        plan: &Plan,
        logger: Option<LoggerPipes>,
        call: impl AsyncFnOnce(Input, Option<&Path>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (plan, fds) = (plan.clone(), process.fds.clone());
        blocking(move || stdio::prepare_terminal(&plan, logger, &fds)).await??;
        let socket = ConsoleSocket::bind(&self.config.state_dir, &process.fds)?;
        let path = socket.path().to_owned();
        // The runtime sends the master before it returns, and the socket's buffer keeps it: no need
        // to accept meanwhile.
        process.fds.settle().await;
        call(Input::Null, Some(&path)).await?;
        Ok(socket.accept(CONSOLE_DEADLINE).await?)
    }

    /// Starts the process's logger, if it has one. Its identity is durable before it is waited for:
    /// a successor has to end it.
    async fn start_logger(
        &self,
        task: &Task,
        process: &TaskProcess,
        plan: &Plan,
    ) -> Result<Option<LoggerPipes>, Error> {
        let Some(logger) = plan.logger().cloned() else {
            return Ok(None);
        };
        let exec = process.exec.as_ref().map(ToString::to_string);
        let whose = LoggedProcess {
            id: exec.unwrap_or_else(|| task.id().to_owned()),
            namespace: task.key.namespace.to_string(),
            context: task.runtime.context().clone(),
            bundle: task.bundle.path.clone(),
        };
        let late = logger.late();
        let is_given_up = Arc::new(AtomicBool::new(false));
        let given_up = Arc::clone(&is_given_up);
        let reaper = self.reaper.clone();
        let spawned = blocking(move || {
            let spawned = logger.spawn(&whose, &reaper);
            if let (Ok(starting), true) = (&spawned, given_up.load(Ordering::Acquire)) {
                starting.kill();
            }
            spawned
        });
        let Ok(starting) = tokio::time::timeout(stdio::READY, spawned).await else {
            is_given_up.store(true, Ordering::Release);
            return Err(late.into());
        };
        let starting = starting??;
        process.logs_by(starting.identity());
        self.save(task).await?;
        Ok(Some(starting.ready().await?))
    }

    /// Watches before the container runs: it may run out of memory at once (containerd
    /// 842cb99a5).
    pub(in crate::task) fn watch_for_oom(&self, task: &Task) {
        if let Some(cgroup) = task.cgroup()
            && let Err(error) = self.oom.watch(task.serial, &cgroup)
        {
            warn!(
                id = %task.id(), %error,
                "cannot watch for OOM kills: they are seen at the exit only"
            );
        }
    }
}

async fn with_pipes(
    task: &Task,
    process: &TaskProcess,
    plan: &Plan,
    logger: Option<LoggerPipes>,
    call: impl AsyncFnOnce(Input, Option<&Path>) -> Result<(), Error>,
) -> Result<(), Error> {
    let (plan, owner, of) = (plan.clone(), task.io_owner(), process.kind());
    let fds = process.fds.clone();
    let child = blocking(move || stdio::prepare(&plan, of, owner, logger, &fds)).await??;
    process.note_pipes();
    if process.exec.is_some() || task.checkpoint.is_some() {
        // These read as soon as the runtime has begun them.
        process.decide_stdin();
    }
    process.fds.settle().await;
    call(Input::Container(child), None).await
}

/// The cgroup of a new container. Without one, statistics and OOM events are missing, nothing else.
pub(in crate::task) async fn find_cgroup(pid: i32) -> Option<Cgroup> {
    match blocking(move || Cgroup::of_process(pid)).await {
        Ok(Ok(cgroup)) => Some(cgroup),
        Ok(Err(error)) => {
            warn!(pid, %error, "cannot find the cgroup of a container: it has no statistics and OOM events");
            None
        }
        Err(_) => None,
    }
}

/// The pid that the runtime wrote.
pub(in crate::task) async fn read_pid(file: &Path) -> Result<i32, Error> {
    let path = PathBuf::from(file);
    let failed = |source| Error::Path {
        doing: "cannot read the runtime's pid file",
        path: path.clone(),
        source,
    };
    let text = tokio::fs::read_to_string(file).await.map_err(failed)?;
    match text.trim().parse() {
        Ok(pid) if pid > 0 => Ok(pid),
        _ => Err(failed(std::io::Error::new(
            std::io::ErrorKind::InvalidData,
            "not a pid",
        ))),
    }
}

/// Opens a process that the runtime has just reported.
pub(in crate::task) fn open_reported(pid: i32) -> Result<Process, Error> {
    Process::open(pid)
        .map_err(|error| Error::Internal(format!("cannot watch the new process: {error}")))
}

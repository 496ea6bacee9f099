//! `Create`: from a bundle to a container whose init waits to be started, or to nothing at all.
//! Owns the order of the steps and their undoing; each step leaves a trace that [`abandon`] finds.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tracing::{info, warn};

use crate::cgroup::Cgroup;
use crate::error::Error;
use crate::event::EventKind;
use crate::failpoint;
use crate::fdstore::ProcessFds;
use crate::process::Process;
use crate::rootfs;
use crate::runtime::{Create, Input, Restore, Runtime};
use crate::spec::Spec;
use crate::stdio::{self, ConsoleSocket, LoggedProcess, LoggerPipes, Plan, StdioError, Streams};
use crate::task::api::CreateTask;
use crate::task::context::Errand;
use crate::task::detached::blocking;
use crate::task::engine::Shared;
use crate::task::exits;
use crate::task::process::TaskProcess;
use crate::task::store::Bundle;
use crate::task::task::Task;

/// How long a runtime that says it has started a terminal may take to hand it over.
pub(super) const CONSOLE_DEADLINE: Duration = Duration::from_secs(10);

/// Creates the task. On failure nothing of it is left. What a predecessor has begun of the same is gone by then, or was finished.
pub(super) async fn create(
    shared: Arc<Shared>,
    request: CreateTask,
    errand: Errand,
) -> Result<u32, Error> {
    if let Ok(task) = shared.task(&request.key)
        && errand.left(task.init.made_by)
    {
        return Ok(task.init.now().pid);
    }
    let plan = Plan::parse(&request.stdio)?;
    let path = request.bundle.clone();
    if !path.is_absolute() {
        return Err(Error::Invalid(format!(
            "bundle {} is not an absolute path",
            path.display()
        )));
    }
    let checkpoint = request.checkpoint.clone();
    let (bundle, spec) = blocking(move || {
        // runc would make an empty one and say that CRIU failed.
        if let Some(image) = checkpoint.filter(|image| !image.is_absolute() || !image.is_dir()) {
            let image = image.display();
            return Err(Error::Invalid(format!(
                "checkpoint {image} is not a directory"
            )));
        }
        let bundle = Bundle::open(&path).map_err(|source| Error::Path {
            doing: "cannot open the bundle",
            path,
            source,
        })?;
        let spec = Spec::read(&bundle.path)?;
        Ok::<_, Error>((bundle, spec))
    })
    .await??;
    let deadline = shared.config.runtime_deadline;
    let runtime = Runtime::new(
        &request.runtime,
        &request.key.namespace,
        &spec,
        deadline,
        shared.orphans.clone(),
    );
    let task = Arc::new(Task::new(
        request,
        bundle,
        runtime,
        spec.has_own_pid_namespace(),
        errand.request,
        shared.new_fds(),
    ));
    if let Err(taken) = reserve(&shared, &task).await {
        return match shared.task(&task.key) {
            Ok(adopted) if errand.left(adopted.init.made_by) => Ok(adopted.init.now().pid),
            _ => Err(taken),
        };
    }
    let _turn = task.init.turn().await?;
    task.init.starting();
    let mut runtime_was_called = false;
    let left = shared.take_client_ends(errand.request);
    match establish(&shared, &task, &plan, left, &mut runtime_was_called).await {
        Ok(pid) => {
            info!(namespace = %task.key.namespace, id = %task.key.id, pid, "created");
            exits::release_early(&shared, &task, &task.init);
            Ok(pid)
        }
        Err(error) => {
            abandon(&shared, &task, runtime_was_called).await;
            Err(error)
        }
    }
}

/// Takes the id. What becomes of a creation that was cut short is waited for.
async fn reserve(shared: &Shared, task: &Arc<Task>) -> Result<(), Error> {
    let deadline = shared.config.runtime_deadline;
    loop {
        let taken = shared.reserve(task);
        match shared.task_even_unfinished(&task.key) {
            Some(earlier) if taken.is_err() && earlier.is_half_created() => {
                let settled = tokio::time::timeout(deadline, earlier.until_settled()).await;
                settled.map_err(|_| Error::Deadline {
                    what: "the end of a creation that was cut short",
                    seconds: deadline.as_secs(),
                })?;
            }
            _ => return taken,
        }
    }
}

async fn establish(
    shared: &Arc<Shared>,
    task: &Arc<Task>,
    plan: &Plan,
    left: Option<ProcessFds>,
    runtime_was_called: &mut bool,
) -> Result<u32, Error> {
    if let Some(left) = left {
        stdio::adopt_client_ends(&task.init.fds, &left)
            .map_err(|source| StdioError::NotKept { source })?;
    }
    task.save(shared).await?;
    mount_rootfs(shared, task).await?;
    if task.checkpoint.is_none() {
        *runtime_was_called = true;
        launch(shared, task, plan).await?;
    }
    created(shared, task).await
}

/// The container is made: everything that follows from that.
pub(super) async fn created(shared: &Arc<Shared>, task: &Arc<Task>) -> Result<u32, Error> {
    task.completed();
    let pid = task.init.now().pid;
    shared.emit(
        task,
        EventKind::Created {
            bundle: task.bundle.path.clone(),
            rootfs: task.rootfs.clone(),
            stdio: task.init.stdio.clone(),
            checkpoint: task.checkpoint.clone(),
            pid,
        },
    );
    if let Err(error) = task.save(shared).await {
        task.uncompleted();
        return Err(error);
    }
    Ok(pid)
}

/// Lets the runtime make the container, anew or from its checkpoint, and watches the init.
pub(super) async fn launch(
    shared: &Arc<Shared>,
    task: &Arc<Task>,
    plan: &Plan,
) -> Result<(), Error> {
    // Until the init is watched, no orphan is reaped: it might be the init.
    let _ticket = shared.orphans.ticket();
    let pid_file = task.pid_file();
    let work = task.bundle.path.join("criu-work");
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
    let streams = with_streams(
        shared,
        task,
        &task.init,
        plan,
        async |input, console_socket: Option<&Path>| {
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
        },
    )
    .await?;
    let process = Arc::new(opened(read_pid(&pid_file).await?)?);
    let pid = process.identity().pid;
    task.init.connect(streams);
    if task.checkpoint.is_some() || plan.terminal() {
        task.init.begin_input();
    }
    task.set_cgroup(find_cgroup(pid).await);
    shared.watch(task, &task.init, process).await?;
    watch_for_oom(shared, task);
    Ok(())
}

/// Makes a process's streams, lets `call` run the runtime with them, and lets them flow if that succeeds.
pub(super) async fn with_streams(
    shared: &Shared,
    task: &Task,
    process: &TaskProcess,
    plan: &Plan,
    call: impl AsyncFnOnce(Input, Option<&Path>) -> Result<(), Error>,
) -> Result<Streams, Error> {
    let logger = start_logger(shared, task, process, plan).await?;
    let called = if plan.terminal() {
        with_terminal(shared, process, plan, logger, call).await
    } else {
        with_pipes(task, process, plan, logger, call).await
    };
    if let Err(error) = called {
        stdio::discard_pipes(&process.fds);
        return Err(error);
    }
    Ok(Streams::start(&process.fds, process.kind(), task.id()))
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
    call(Input::Container(child), None).await
}

async fn with_terminal(
    shared: &Shared,
    process: &TaskProcess,
    plan: &Plan,
    logger: Option<LoggerPipes>,
    call: impl AsyncFnOnce(Input, Option<&Path>) -> Result<(), Error>,
) -> Result<(), Error> {
    let (plan, fds, directory) = (plan.clone(), process.fds.clone(), &shared.config.state_dir);
    blocking(move || stdio::prepare_terminal(&plan, logger, &fds)).await??;
    let socket = ConsoleSocket::bind(directory, &process.fds)?;
    let path = socket.path().to_owned();
    // The runtime sends the master before it returns, and the socket's buffer keeps it: no need to accept meanwhile.
    call(Input::Null, Some(&path)).await?;
    Ok(socket.accept(CONSOLE_DEADLINE).await?)
}

/// Starts the process's logger, if it has one. Its identity is durable before it is waited for: a successor has to end it.
async fn start_logger(
    shared: &Shared,
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
    let orphans = shared.orphans.clone();
    let spawned = blocking(move || {
        let spawned = logger.spawn(&whose, &orphans);
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
    task.save(shared).await?;
    Ok(Some(starting.ready().await?))
}

/// Ends the process's logger, if it has one.
pub(super) async fn end_logger(process: &TaskProcess) {
    if let Some(logger) = process.take_logger() {
        stdio::end_logger(logger).await;
    }
}

async fn mount_rootfs(shared: &Shared, task: &Task) -> Result<(), Error> {
    if task.rootfs.is_empty() {
        return Ok(());
    }
    let (mounts, target) = (task.rootfs.clone(), task.rootfs_path());
    let context = rootfs::HelperContext {
        orphans: shared.orphans.clone(),
        context: task.runtime.context().clone(),
        directory: task.bundle.path.clone(),
    };
    failpoint::step("before the root is mounted");
    let mounted = blocking(move || rootfs::mount_all(&mounts, &target, &context)).await?;
    failpoint::step("after the root was mounted");
    mounted.map_err(Error::Rootfs)
}

/// Undoes whatever a failed [`establish`] did. Each step is tried, whatever became of the others.
async fn abandon(shared: &Arc<Shared>, task: &Arc<Task>, runtime_was_called: bool) {
    if let Some(identity) = task.init.identity() {
        shared.disown(identity);
        if let Err(error) = shared.monitor.unwatch(identity).await {
            warn!(id = %task.id(), %error, "cannot end the watch of a container that was not created");
        }
    }
    task.init.start_failed();
    end_logger(&task.init).await;
    shared.oom.unwatch(task.serial);
    remove_traces(shared, task, runtime_was_called).await;
    shared.release(task);
}

/// Removes container, mounts and record of a task that is not to be. Idempotent.
pub(super) async fn remove_traces(shared: &Shared, task: &Task, runtime_was_called: bool) {
    if runtime_was_called
        && let Err(error) = task.runtime.delete(task.id(), true, &task.log()).await
    {
        // The runtime is missing, say, which is what the client is told already.
        warn!(id = %task.id(), %error, "cannot delete a container that was not created");
    }
    if !task.rootfs.is_empty() {
        let target = task.rootfs_path();
        match blocking(move || rootfs::unmount_recursive(&target)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(id = %task.id(), %error, "cannot unmount"),
            Err(error) => warn!(id = %task.id(), %error, "cannot unmount"),
        }
    }
    let (store, key) = (shared.store.clone(), task.key.clone());
    if let Ok(Err(error)) | Err(error) = blocking(move || store.remove(&key)).await {
        warn!(id = %task.id(), %error, "cannot remove a task record");
    }
}

/// The cgroup of a new container. Without one, statistics and OOM events are missing, nothing else.
pub(super) async fn find_cgroup(pid: i32) -> Option<Cgroup> {
    match blocking(move || Cgroup::of_process(pid)).await {
        Ok(Ok(cgroup)) => Some(cgroup),
        Ok(Err(error)) => {
            warn!(pid, %error, "no cgroup: statistics and OOM events will be missing");
            None
        }
        Err(_) => None,
    }
}

/// Starts watching before the container runs: it may run out of memory at once (842cb99a5 in containerd).
pub(super) fn watch_for_oom(shared: &Shared, task: &Task) {
    if let Some(cgroup) = task.cgroup()
        && let Err(error) = shared.oom.watch(task.serial, &cgroup)
    {
        warn!(id = %task.id(), %error, "cannot watch for OOM kills: they will be seen at the exit only");
    }
}

/// The pid that the runtime wrote.
pub(super) async fn read_pid(file: &Path) -> Result<i32, Error> {
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

/// Opens a process the runtime has just told us of.
pub(super) fn opened(pid: i32) -> Result<Process, Error> {
    Process::open(pid)
        .map_err(|error| Error::Internal(format!("cannot watch the new process: {error}")))
}

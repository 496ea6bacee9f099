//! `Start`, of the init and of execs, and `Exec`, which only declares one.
//! Owns that a started process is watched before anybody can miss its end.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tracing::{debug, info, warn};

use crate::clock::BootTime;
use crate::error::Error;
use crate::event::EventKind;
use crate::id::{ExecId, ProcessKey};
use crate::runtime::{Exec, last_error};
use crate::spec::nullable;
use crate::stdio::Plan;
use crate::task::api::ExecProcess;
use crate::task::context::{Errand, RequestId};
use crate::task::detached::blocking;
use crate::task::engine::Shared;
use crate::task::exits;
use crate::task::launch::{end_logger, launch, opened, read_pid, with_streams};
use crate::task::lifecycle::{Operation, Phase};
use crate::task::process::TaskProcess;
use crate::task::recovery::unreported;
use crate::task::task::Task;

/// Starts the init or an exec.
pub(in crate::task) async fn start(
    shared: Arc<Shared>,
    key: ProcessKey,
    errand: Errand,
) -> Result<u32, Error> {
    if key.exec.is_some() && !errand.is_again {
        // Before anything about the exec itself, as runc-v2 does (e7357916b in containerd).
        shared.task(&key.task)?.admit_exec_start()?;
    }
    let (task, process) = shared.process(&key)?;
    let _turn = process.turn().await?;
    if process.was_started_by(&errand) {
        return Ok(process.now().pid);
    }
    match process.exec.clone() {
        None => start_init(&shared, &task, errand.request).await,
        Some(exec) => start_exec(&shared, &task, &process, &exec, errand.request).await,
    }
}

async fn start_init(
    shared: &Arc<Shared>,
    task: &Arc<Task>,
    request: Option<RequestId>,
) -> Result<u32, Error> {
    let init = &task.init;
    init.now().phase.admit(Operation::Start)?;
    init.starting();
    if init.start_mark().is_none() {
        init.decide_stdin();
    }
    init.mark_start(request);
    if let Err(error) = task.save(shared).await {
        init.unmark_start();
        exits::release_early(shared, task, init);
        return Err(error);
    }
    let result = if task.checkpoint.is_some() {
        restore(shared, task).await
    } else {
        init.begin_input();
        task.runtime.start(task.id(), &task.log()).await
    };
    if result.is_ok() {
        init.advance(Phase::Created, Phase::Running);
        let pid = init.now().pid;
        shared.emit(task, EventKind::Started { pid });
        info!(namespace = %task.key.namespace, id = %task.id(), pid, "started");
    }
    if result.is_err() {
        init.unmark_start();
    }
    // After a crash before this, a process that was marked and is not said to run is looked at
    // (resumption).
    let saved = task.save(shared).await;
    exits::release_early(shared, task, init);
    result?;
    saved?;
    Ok(init.now().pid)
}

/// Brings a container back from its checkpoint. On failure the task is what it was before.
async fn restore(shared: &Arc<Shared>, task: &Arc<Task>) -> Result<(), Error> {
    let plan = Plan::parse(&task.init.stdio)?;
    let restored = launch(shared, task, &plan).await;
    if restored.is_err() {
        if let Some(identity) = task.init.identity() {
            // Unwatched it has no owner: with one, its zombie would be waited for by nobody, for
            // ever.
            shared.disown(identity);
            let _ = shared.monitor.unwatch(identity).await;
        }
        task.init.unmake();
        task.init.fds.forget_all();
        end_logger(&task.init).await;
        if let Err(error) = task.runtime.delete(task.id(), true, &task.log()).await {
            warn!(id = %task.id(), %error, "cannot delete a container that was not restored");
        }
    }
    restored
}

async fn start_exec(
    shared: &Arc<Shared>,
    task: &Arc<Task>,
    process: &Arc<TaskProcess>,
    exec: &ExecId,
    request: Option<RequestId>,
) -> Result<u32, Error> {
    process.now().phase.admit(Operation::Start)?;
    process.admit_first_start()?;
    task.enter_exec()?;
    process.starting();
    process.mark_start(request);
    let files = ExecFiles::new(&task.bundle.path, exec);
    match run_exec(shared, task, process, &files).await {
        Ok(pid) => {
            files.remove().await;
            exec_started(shared, task, process, exec).await?;
            Ok(pid)
        }
        Err(error) => {
            if process.identity().is_none() {
                files.kill_unwatched(task, process).await;
            }
            files.remove().await;
            if let Some(identity) = process.identity() {
                shared.disown(identity);
                if let Some(unwatched) = process.process() {
                    // It runs, but nobody would ever learn of its end: it must not go on.
                    let _ = unwatched.signal(libc::SIGKILL);
                }
            }
            process.start_failed();
            // First: the init's exit may wait for this, and a logger may take its 12 s.
            task.leave_exec(shared);
            if let Err(unsaved) = task.save(shared).await {
                warn!(id = %task.id(), exec_id = %exec, error = %unsaved, "that an exec could not be started is not durable");
            }
            end_logger(process).await;
            Err(error)
        }
    }
}

/// It runs and is watched: everything that follows from that.
pub(in crate::task) async fn exec_started(
    shared: &Arc<Shared>,
    task: &Arc<Task>,
    process: &Arc<TaskProcess>,
    exec: &ExecId,
) -> Result<(), Error> {
    process.advance(Phase::Created, Phase::Running);
    process.forget_spec();
    let (exec, pid) = (exec.clone(), process.now().pid);
    debug!(namespace = %task.key.namespace, id = %task.id(), exec_id = %exec, pid, "exec started");
    shared.emit(task, EventKind::ExecStarted { exec, pid });
    let saved = task.save(shared).await;
    exits::release_early(shared, task, process);
    saved
}

async fn run_exec(
    shared: &Arc<Shared>,
    task: &Arc<Task>,
    process: &Arc<TaskProcess>,
    files: &ExecFiles,
) -> Result<u32, Error> {
    let plan = Plan::parse(&process.stdio)?;
    let spec = process
        .spec()
        .ok_or_else(|| Error::Internal("the exec has no process document".into()))?;
    // A pid file of an earlier attempt would be taken for this one's.
    files.remove().await;
    files.write_process(spec).await?;
    task.save(shared).await?;
    // Until the exec is watched, no orphan is reaped: it might be the exec, ended already.
    let _ticket = shared.orphans.ticket();
    let streams = with_streams(
        shared,
        task,
        process,
        &plan,
        async |input, console_socket: Option<&Path>| {
            let call = Exec {
                id: task.id(),
                process: &files.process,
                pid_file: &files.pid,
                mark: &files.mark,
                console_socket,
                log: &files.log,
            };
            task.runtime.exec(&call, input).await
        },
    )
    .await?;
    let opened = Arc::new(opened(read_pid(&files.pid).await?)?);
    process.connect(streams);
    process.begin_input();
    shared.watch(task, process, opened).await?;
    Ok(process.now().pid)
}

/// The files of one `exec` call in the bundle. Exec ids can't hold a slash, nor begin with a dot.
pub(in crate::task) struct ExecFiles {
    process: PathBuf,
    /// Where the runtime writes the pid.
    pub(in crate::task) pid: PathBuf,
    /// Made when the runtime is called.
    mark: PathBuf,
    log: PathBuf,
}

impl ExecFiles {
    pub(in crate::task) fn new(bundle: &Path, exec: &ExecId) -> Self {
        let file = |suffix| bundle.join(format!(".exec-{exec}.{suffix}"));
        Self {
            process: file("process.json"),
            pid: file("pid"),
            mark: file("called"),
            log: file("log.json"),
        }
    }

    async fn write_process(&self, spec: String) -> Result<(), Error> {
        let path = self.process.clone();
        tokio::fs::write(&path, spec)
            .await
            .map_err(|source| Error::Path {
                doing: "cannot write the exec's process document",
                path,
                source,
            })
    }

    /// Whether the process may have been started, though its pid is not told: not if the runtime was
    /// never called, nor if it has said why it failed.
    pub(in crate::task) async fn may_have_begun(&self) -> bool {
        // What cannot be looked at may be there.
        let was_called = tokio::fs::try_exists(&self.mark).await.unwrap_or(true);
        was_called && last_error(&self.log).await.is_none()
    }

    /// The start has failed after the runtime has started the process: it runs, but its end would
    /// never be learned.
    async fn kill_unwatched(&self, task: &Arc<Task>, process: &Arc<TaskProcess>) {
        let started = match read_pid(&self.pid).await {
            Ok(pid) => opened(pid).ok(),
            Err(_) if self.may_have_begun().await => unreported::find(task, process).await,
            Err(_) => None,
        };
        if let Some(started) = started {
            let _ = started.signal(libc::SIGKILL);
        }
    }

    /// When the exec has begun, in ticks since boot: after its document was written and before its
    /// pid was. The wall clock of the files is not exact.
    pub(in crate::task) async fn beginning(&self) -> Option<RangeInclusive<u64>> {
        const TOLERANCE: Duration = Duration::from_secs(1);
        let files = [self.process.clone(), self.pid.clone()];
        let times = blocking(move || files.map(|file| file.metadata()?.modified())).await;
        let [Ok(first), Ok(last)] = times.ok()? else {
            return None;
        };
        let first = BootTime::of_wall(first.checked_sub(TOLERANCE)?);
        let last = BootTime::of_wall(last.checked_add(TOLERANCE)?);
        Some(first.ticks()..=last.ticks())
    }

    pub(in crate::task) async fn remove(&self) {
        let files = [&self.process, &self.pid, &self.log, &self.mark].map(PathBuf::clone);
        // Left-overs would go with the bundle.
        let _ = blocking(move || files.map(|file| std::fs::remove_file(file).is_ok())).await;
    }
}

/// The OCI `Process` field that must agree with the request.
#[derive(Deserialize)]
struct ProcessTerminal {
    #[serde(default, deserialize_with = "nullable")]
    terminal: bool,
}

/// Declares an exec; nothing runs yet.
pub(in crate::task) async fn exec(
    shared: Arc<Shared>,
    request: ExecProcess,
    errand: Errand,
) -> Result<(), Error> {
    let task = shared.task(&request.task)?;
    if let Ok(known) = task.find(Some(&request.exec)) {
        if errand.left(known.made_by) {
            return Ok(());
        }
        return Err(Error::IdTaken {
            id: request.exec.to_string(),
        });
    }
    let phase = task.init.now().phase;
    if task.checkpoint.is_some() && phase == Phase::Created {
        return Err(Error::WrongState("cannot exec in a created state"));
    }
    phase.admit(Operation::Exec)?;
    Plan::parse(&request.stdio)?;
    let spec = process_document(&request.spec, request.stdio.terminal)?;
    task.add_exec(
        request.exec.clone(),
        TaskProcess::new(
            Some(request.exec.clone()),
            request.stdio,
            Some(spec),
            errand.request,
            shared.new_fds(),
        ),
    )?;
    let exec = request.exec.clone();
    shared.emit(&task, EventKind::ExecAdded { exec });
    let saved = task.save(&shared).await;
    if saved.is_err() {
        task.remove_exec(&request.exec);
    }
    saved
}

/// The document as the runtime is to get it: its `terminal` is the request's, as runc-v2 sets it.
fn process_document(spec: &[u8], terminal: bool) -> Result<String, Error> {
    let invalid =
        |why: String| Error::Invalid(format!("the exec's process document is not valid: {why}"));
    let mut document: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(spec).map_err(|e| invalid(e.to_string()))?;
    let stated: ProcessTerminal =
        serde_json::from_slice(spec).map_err(|e| invalid(e.to_string()))?;
    if stated.terminal != terminal {
        document.insert("terminal".into(), terminal.into());
    }
    serde_json::to_string(&document).map_err(|e| invalid(e.to_string()))
}

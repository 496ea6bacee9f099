//! The OCI runtime driver: calls runc, or what is compatible with it, and tells its errors in
//! runc-v2's words. Owns how the binary is called; never decides when, and keeps no state about
//! containers.

mod arguments;
pub(crate) mod caller;
mod calls;
mod direct;
mod failure;
mod group;
mod inflight;
mod log;
mod options;
mod output;

use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};
use tracing::warn;

pub(crate) use arguments::{Checkpoint, Create, Exec, Restore};
pub(crate) use calls::Calls;
pub use calls::RuntimeCall;
use failure::Failure;
pub(crate) use inflight::{InFlightCalls, is_criu_at_work, wait_for};
pub(crate) use log::last_error;
pub use options::RuntimeOptions;
use output::Collected;

use crate::child_context::ChildContext;
use crate::error::Error;
use crate::failpoint;
use crate::id::TaskKey;
use crate::process::{Process, ProcessIdentity};
use crate::program::touch;
use crate::reaper::Reaper;
use crate::spec::Traits;
use crate::stdio::ChildStdio;
use crate::sys;

/// How often a call that can be repeated at will is made, if its runtime is killed each time.
const REPEATS: u32 = 4;
/// What is asked of the runtime for a container whose bundle containerd has removed. None of it is
/// asked in an ordinary life.
const OF_LOST_BUNDLES: [&str; 4] = ["delete", "kill", "resume", "state"];
const CHECKPOINT: &str = "checkpoint";

/// The OCI runtime as one container uses it.
#[derive(Clone, Debug)]
pub(crate) struct Runtime {
    task: TaskKey,
    binary: String,
    root: PathBuf,
    systemd_cgroup: bool,
    no_pivot_root: bool,
    no_new_keyring: bool,
    context: ChildContext,
    deadline: Duration,
    reaper: Reaper,
    calls: Calls,
    /// Made when the program is called; see [`Exec::mark`].
    mark: Option<PathBuf>,
}

/// The standard streams of one invocation.
pub(crate) enum Input {
    /// All `/dev/null`, for the short commands.
    Null,
    /// Those of the container: `create` and `exec` pass them on.
    Container(ChildStdio),
    /// A document on standard input.
    Document(Vec<u8>),
}

/// A container as the runtime knows it.
#[derive(Debug, serde::Deserialize)]
pub(crate) struct State {
    /// What it does.
    pub(crate) status: RuntimeStatus,
    /// The init's, or 0.
    #[serde(default)]
    pub(crate) pid: i32,
}

/// What a container does, in the words of the OCI runtime specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum RuntimeStatus {
    Creating,
    Created,
    Running,
    Stopped,
    /// runc's and crun's own, for a container that is frozen.
    Paused,
    /// Another runtime's own.
    #[serde(other)]
    Other,
}

impl Runtime {
    /// The runtime for this container, by the request's options and the container's spec.
    ///
    /// `deadline` bounds each call; a runtime that takes longer is killed. Each call is listed in
    /// `calls`.
    pub(crate) fn new(
        options: &RuntimeOptions,
        task: &TaskKey,
        traits: Traits,
        deadline: Duration,
        reaper: Reaper,
        calls: Calls,
    ) -> Self {
        Self {
            task: task.clone(),
            binary: options.binary_or_default().to_owned(),
            root: options.root_of(&task.namespace),
            systemd_cgroup: options
                .systemd_cgroup
                .unwrap_or_else(|| traits.systemd_cgroup && has_systemd()),
            no_pivot_root: options.no_pivot_root,
            no_new_keyring: options.no_new_keyring,
            context: options.context.clone(),
            deadline,
            reaper,
            calls,
            mark: None,
        }
    }

    /// The file name of its program.
    pub(crate) fn program_name(&self) -> OsString {
        let name = Path::new(&self.binary).file_name();
        name.unwrap_or_default().to_owned()
    }

    /// The directory in which it notes what it knows of a container.
    pub(crate) fn state_of(&self, id: &str) -> PathBuf {
        self.root.join(id)
    }

    /// Whether systemd makes and removes its cgroups.
    pub(crate) fn has_systemd_cgroup(&self) -> bool {
        self.systemd_cgroup
    }

    /// What it and all others that are started for the container inherit.
    pub(crate) fn context(&self) -> &ChildContext {
        &self.context
    }

    /// `create`: the container exists and its init waits on the exec fifo.
    pub(crate) async fn create(&self, create: &Create<'_>, streams: Input) -> Result<(), Error> {
        let mut arguments = create.clone();
        arguments.no_pivot_root = self.no_pivot_root;
        arguments.no_new_keyring = self.no_new_keyring;
        self.run("create", arguments.build(), streams, create.log)
            .await
            .map(drop)
    }

    /// `restore --detach`: the container comes back from a checkpoint, and runs.
    pub(crate) async fn restore(&self, restore: &Restore<'_>, streams: Input) -> Result<(), Error> {
        let mut create = restore.create.clone();
        create.no_pivot_root = self.no_pivot_root;
        let restore = Restore {
            create: &create,
            ..*restore
        };
        self.run("restore", restore.build(), streams, create.log)
            .await
            .map(drop)
    }

    /// `checkpoint`: its state is written to files.
    pub(crate) async fn checkpoint(
        &self,
        checkpoint: &Checkpoint<'_>,
        log: &Path,
    ) -> Result<(), Error> {
        self.run(CHECKPOINT, checkpoint.build(), Input::Null, log)
            .await
            .map(drop)
    }

    /// `start`: the init goes on to the container's program. With nothing more to do than that, no
    /// process of the runtime is needed.
    pub(crate) async fn start(
        &self,
        id: &str,
        init: Option<Arc<Process>>,
        log: &Path,
    ) -> Result<(), Error> {
        if let Some(init) = init
            && self.start_directly(id, init, log).await?
        {
            return Ok(());
        }
        self.run("start", arguments::start(id), Input::Null, log)
            .await
            .map(drop)
    }

    /// `exec --detach`: another process in the container.
    pub(crate) async fn exec(&self, exec: &Exec<'_>, streams: Input) -> Result<(), Error> {
        let marking = Self {
            mark: Some(exec.mark.to_owned()),
            ..self.clone()
        };
        marking
            .run("exec", exec.build(), streams, exec.log)
            .await
            .map(drop)
    }

    /// `kill`: a signal to the init, or to all processes.
    pub(crate) async fn kill(
        &self,
        id: &str,
        signal: u32,
        all: bool,
        log: &Path,
    ) -> Result<(), Error> {
        match self
            .invoke("kill", arguments::kill(id, signal, all), Input::Null, log)
            .await
        {
            Ok(_) => Ok(()),
            Err(failure) => Err(failure.of_kill(&self.binary, self.deadline, log).await),
        }
    }

    /// `delete`. A container the runtime does not know is deleted already.
    pub(crate) async fn delete(&self, id: &str, force: bool, log: &Path) -> Result<(), Error> {
        match self
            .run_until_it_ends("delete", arguments::delete(id, force), log)
            .await
        {
            Err(Error::Runtime { message, .. }) if message.contains("does not exist") => Ok(()),
            other => other.map(drop),
        }
    }

    /// `delete` of a container whose `init` has ended, and with it all of its processes.
    pub(crate) async fn delete_ended(
        &self,
        id: &str,
        init: ProcessIdentity,
        log: &Path,
    ) -> Result<(), Error> {
        if self.delete_directly(id, init, log).await {
            return Ok(());
        }
        self.delete(id, false, log).await
    }

    /// `pause`: all processes are frozen.
    pub(crate) async fn pause(&self, id: &str, log: &Path) -> Result<(), Error> {
        self.run("pause", arguments::pause(id), Input::Null, log)
            .await
            .map(drop)
    }

    /// `resume`: they run again.
    pub(crate) async fn resume(&self, id: &str, log: &Path) -> Result<(), Error> {
        self.run("resume", arguments::resume(id), Input::Null, log)
            .await
            .map(drop)
    }

    /// What `state` says.
    pub(crate) async fn state(&self, id: &str, log: &Path) -> Result<State, Error> {
        let stdout = self
            .run_until_it_ends("state", arguments::state(id), log)
            .await?;
        serde_json::from_slice(&stdout).map_err(|e| Error::Runtime {
            operation: "state",
            message: format!("its answer cannot be read: {e}"),
        })
    }

    /// `update` with an OCI `LinuxResources` document.
    pub(crate) async fn update(
        &self,
        id: &str,
        resources: Vec<u8>,
        log: &Path,
    ) -> Result<(), Error> {
        self.run(
            "update",
            arguments::update(id),
            Input::Document(resources),
            log,
        )
        .await
        .map(drop)
    }

    async fn run(
        &self,
        operation: &'static str,
        arguments: Vec<OsString>,
        streams: Input,
        log: &Path,
    ) -> Result<Vec<u8>, Error> {
        match self.invoke(operation, arguments, streams, log).await {
            Ok(stdout) => Ok(stdout),
            Err(failure) => {
                let is_killed = failure.is_killed();
                let message = failure
                    .message(operation, &self.binary, self.deadline, log)
                    .await;
                Err(if is_killed {
                    Error::RuntimeKilled { operation, message }
                } else {
                    Error::Runtime { operation, message }
                })
            }
        }
    }

    /// A call that does no harm when it is made again: it is, if the runtime is killed in it.
    async fn run_until_it_ends(
        &self,
        operation: &'static str,
        arguments: Vec<OsString>,
        log: &Path,
    ) -> Result<Vec<u8>, Error> {
        let begun = Instant::now();
        let mut repeats = 0;
        loop {
            let result = self
                .run(operation, arguments.clone(), Input::Null, log)
                .await;
            repeats += 1;
            let is_over = repeats == REPEATS || begun.elapsed() >= self.deadline;
            match result {
                Err(Error::RuntimeKilled { message, .. }) if !is_over => {
                    warn!(operation, %message, "calling the OCI runtime again");
                }
                result => return result,
            }
        }
    }

    /// One invocation. The guard keeps its orphans unreaped until the caller knows their pids, so
    /// callers that read a pid file hold their own guard around the whole.
    async fn invoke(
        &self,
        operation: &'static str,
        arguments: Vec<OsString>,
        streams: Input,
        log: &Path,
    ) -> Result<Vec<u8>, Failure> {
        let mut command = Command::new(&self.binary);
        command.arg("--root").arg(&self.root);
        // Without its directory runc would not begin; without a log it says all on its stderr.
        if !OF_LOST_BUNDLES.contains(&operation) || has_directory(log).await {
            command.arg("--log").arg(log).args(["--log-format", "json"]);
        }
        if self.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command.args(arguments);
        self.call(operation, command, streams, log).await
    }

    /// Runs a command of the runtime's in the directory of `log`, and gives what it says.
    async fn call(
        &self,
        operation: &'static str,
        mut command: Command,
        streams: Input,
        log: &Path,
    ) -> Result<Vec<u8>, Failure> {
        let _guard = self.reaper.guard();
        let mut in_flight = self.calls.begin(&self.task, operation);
        #[cfg(feature = "spans")]
        in_flight.report_to_caller(&self.binary);
        let mut input = None;
        match streams {
            Input::Null => {
                command
                    .stdin(Stdio::null())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped());
            }
            Input::Document(document) => {
                command
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped());
                input = Some(document);
            }
            Input::Container(ChildStdio {
                stdin,
                stdout,
                stderr,
            }) => {
                let [stdin, stdout, stderr] =
                    [stdin, stdout, stderr].map(|fd: OwnedFd| Stdio::from(fd));
                command.stdin(stdin).stdout(stdout).stderr(stderr);
            }
        }
        let begun = Instant::now();
        let mut child = self.spawn(command, log.to_owned()).await?;
        let leader = child.id();
        let stdout = Collected::begin(child.stdout.take());
        let stderr = child.stderr.take().map(|pipe| Collected::begin(Some(pipe)));
        let stdin = child.stdin.take();
        let ended = async {
            if let (Some(document), Some(mut stdin)) = (input, stdin) {
                // A runtime that does not read its input says why by its status, or is late.
                let _ = stdin.write_all(&document).await;
            }
            child.wait().await
        };
        let left = self.deadline.saturating_sub(begun.elapsed());
        let Ok(status) = tokio::time::timeout(left, ended).await else {
            group::kill(&child);
            return Err(Failure::Late);
        };
        let status = in_flight.ended(status.map_err(Failure::NotRun)?);
        failpoint::step("after the runtime has ended");
        if operation == CHECKPOINT && !status.success() {
            let left = self.deadline.saturating_sub(begun.elapsed());
            group::wait_for_end(leader, left).await;
        }
        if status.success() {
            return Ok(stdout.take().await);
        }
        let stderr = match stderr {
            Some(stderr) => Some(String::from_utf8_lossy(&stderr.take().await).into_owned()),
            None => None,
        };
        Err(Failure::Exited { status, stderr })
    }

    /// Starts the runtime in a thread of its own: that waits for `execve`, and the file system that
    /// the program is on may not answer. The command holds our copies of the container's streams,
    /// and a writer we kept would hide their end, so it ends here.
    async fn spawn(&self, mut command: Command, log: PathBuf) -> Result<Child, Failure> {
        let (limit, context) = (self.deadline, self.context.clone());
        let mark = self.mark.as_deref().map(|mark| mark.as_os_str().as_bytes());
        let mark = mark
            .map(CString::new)
            .transpose()
            .map_err(|nul| Failure::NotRun(nul.into()))?;
        let is_given_up = Arc::new(AtomicBool::new(false));
        let given_up = Arc::clone(&is_given_up);
        let spawned = tokio::task::spawn_blocking(move || {
            log::discard(&log);
            // Where a shim of the container's own would be: wrappers read `config.json` there.
            context.give(command.as_std_mut(), log.parent().unwrap_or(Path::new("/")));
            if let Some(mark) = mark {
                sys::mark_exec(command.as_std_mut(), mark);
            }
            touch(command.as_std().get_program(), context.variable("PATH"));
            failpoint::step("before the runtime is called");
            let child = command.spawn();
            failpoint::step("after the runtime was called");
            if given_up.load(Ordering::Acquire)
                && let Ok(child) = &child
            {
                group::kill(child);
            }
            child
        });
        match tokio::time::timeout(limit, spawned).await {
            Err(_late) => {
                is_given_up.store(true, Ordering::Release);
                Err(Failure::Late)
            }
            Ok(Err(panic)) => Err(Failure::NotRun(io::Error::other(panic))),
            Ok(Ok(child)) => child.map_err(Failure::NotRun),
        }
    }
}

/// Whether the directory of a file is there.
async fn has_directory(file: &Path) -> bool {
    let directory = file.parent().unwrap_or(Path::new("/"));
    tokio::fs::metadata(directory)
        .await
        .is_ok_and(|found| found.is_dir())
}

/// Whether systemd is the init system, as `sd_booted(3)` finds out: without it no cgroup can be
/// asked of it.
fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

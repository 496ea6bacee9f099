//! The OCI runtime driver: calls runc, or what is compatible with it, and tells its errors in
//! runc-v2's words. Owns how the binary is called; never decides when, and keeps no state about
//! containers.

mod arguments;
mod failure;
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

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};
use tracing::warn;

pub(crate) use arguments::{Checkpoint, Create, Exec, Restore};
use failure::Failure;
pub(crate) use inflight::{InFlightCalls, wait_for};
pub(crate) use log::last_error;
pub use options::RuntimeOptions;
use output::Collected;

use crate::child_context::ChildContext;
use crate::error::Error;
use crate::failpoint;
use crate::id::Namespace;
use crate::program::touch;
use crate::reaper::Reaper;
use crate::spec::Spec;
use crate::stdio::ChildStdio;
use crate::sys;

/// How often a call that can be repeated at will is made, if its runtime is killed each time.
const REPEATS: u32 = 4;

/// The OCI runtime as one container uses it.
#[derive(Clone, Debug)]
pub(crate) struct Runtime {
    binary: String,
    root: PathBuf,
    systemd_cgroup: bool,
    no_pivot_root: bool,
    no_new_keyring: bool,
    context: ChildContext,
    deadline: Duration,
    reaper: Reaper,
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
    /// The runtime for containers of `namespace`, by the request's options and the container's
    /// spec.
    ///
    /// `deadline` bounds each call; a runtime that takes longer is killed.
    pub(crate) fn new(
        options: &RuntimeOptions,
        namespace: &Namespace,
        spec: &Spec,
        deadline: Duration,
        reaper: Reaper,
    ) -> Self {
        Self {
            binary: options.binary_or_default().to_owned(),
            root: options.root_of(namespace),
            systemd_cgroup: options
                .systemd_cgroup
                .unwrap_or_else(|| spec.wants_systemd_cgroup() && has_systemd()),
            no_pivot_root: options.no_pivot_root,
            no_new_keyring: options.no_new_keyring,
            context: options.context.clone(),
            deadline,
            reaper,
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
        self.run("checkpoint", checkpoint.build(), Input::Null, log)
            .await
            .map(drop)
    }

    /// `start`: the init goes on to the container's program.
    pub(crate) async fn start(&self, id: &str, log: &Path) -> Result<(), Error> {
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
            .invoke(arguments::kill(id, signal, all), Input::Null, log)
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
        match self.invoke(arguments, streams, log).await {
            Ok(stdout) => Ok(stdout),
            Err(failure) => {
                let is_killed = failure.is_killed();
                let message = failure.message(&self.binary, self.deadline, log).await;
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
        arguments: Vec<OsString>,
        streams: Input,
        log: &Path,
    ) -> Result<Vec<u8>, Failure> {
        let _guard = self.reaper.guard();
        log::discard(log).await;
        let mut command = Command::new(&self.binary);
        command
            .arg("--root")
            .arg(&self.root)
            .arg("--log")
            .arg(log)
            .arg("--log-format")
            .arg("json");
        if self.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command.args(arguments).process_group(0);
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
        // Where a shim of the container's own would be: wrappers read `config.json` there.
        let directory = log.parent().unwrap_or(Path::new("/")).to_owned();
        let mut child = self.spawn(command, directory).await?;
        let output = [
            Collected::begin(child.stdout.take()),
            Collected::begin(child.stderr.take()),
        ];
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
            kill_group(&child);
            return Err(Failure::Late);
        };
        let status = status.map_err(Failure::NotRun)?;
        failpoint::step("after the runtime has ended");
        let [stdout, stderr] = output;
        if status.success() {
            return Ok(stdout.take().await);
        }
        let stderr = String::from_utf8_lossy(&stderr.take().await)
            .trim()
            .to_owned();
        Err(Failure::Exited {
            code: status.code(),
            stderr,
        })
    }

    /// Starts the runtime in a thread of its own: that waits for `execve`, and the file system that
    /// the program is on may not answer. The command holds our copies of the container's streams,
    /// and a writer we kept would hide their end, so it ends here.
    async fn spawn(&self, mut command: Command, directory: PathBuf) -> Result<Child, Failure> {
        let (limit, context) = (self.deadline, self.context.clone());
        let mark = self.mark.as_deref().map(|mark| mark.as_os_str().as_bytes());
        let mark = mark
            .map(CString::new)
            .transpose()
            .map_err(|nul| Failure::NotRun(nul.into()))?;
        let is_given_up = Arc::new(AtomicBool::new(false));
        let given_up = Arc::clone(&is_given_up);
        let spawned = tokio::task::spawn_blocking(move || {
            context.give(command.as_std_mut(), &directory);
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
                kill_group(child);
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

/// Whether systemd is the init system, as `sd_booted(3)` finds out: without it no cgroup can be
/// asked of it.
fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Kills the runtime, and as it has a process group of its own, hooks and `runc init` with it.
fn kill_group(child: &Child) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

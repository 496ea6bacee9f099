//! [`Program`]: the file that the daemon and the next keeper are started from. Owns that its path
//! is looked up each time, so that a replaced file is used at the next start.

use std::ffi::{OsStr, OsString};
use std::ops::DerefMut;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use std::{env, io};

use anyhow::{Context, bail};
use command_fds::{CommandFdExt, FdMapping};
use rustix::process::Pid;

use super::fd_table::FdTable;
use super::handover::Format;
use crate::cli::{Keep, Locations, Serve, UNDERSTANDS, WATCHDOG, WATCHDOG_VARIABLE};
use crate::service_manager::activation::PREDECESSOR;
use crate::state_dir::file_id::FileId;

/// The file that this process runs, also if it was replaced at its path.
const SELF: &str = "/proc/self/exe";
/// How long a program may take to answer whether it can be the next keeper.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long to wait before the program is asked again whether it has ended.
const PAUSE: Duration = Duration::from_millis(5);

/// The program, and the options that are passed to it.
#[derive(Debug)]
pub(super) struct Program {
    path: PathBuf,
    options: Vec<OsString>,
    /// In seconds; passed in the environment, since not every version has an option for it.
    watchdog: u64,
}

impl Program {
    /// The program of this keeper, by the path that it was started by: that may be a link, which
    /// leads elsewhere after an upgrade.
    pub(super) fn of_keeper(options: &Keep) -> io::Result<Self> {
        let watchdog = options.watchdog;
        Self::with(&options.locations, options.log_level.as_deref(), watchdog)
    }

    /// The program of this daemon, which becomes the keeper.
    pub(super) fn of_daemon(options: &Serve) -> io::Result<Self> {
        let watchdog = options.keeper_watchdog.unwrap_or(WATCHDOG);
        Self::with(&options.locations, options.log_level.as_deref(), watchdog)
    }

    fn with(locations: &Locations, log_level: Option<&str>, watchdog: u64) -> io::Result<Self> {
        let called = env::args_os().next().map(PathBuf::from);
        let called = called.filter(|path| path.is_absolute() && is_self(path));
        let path = match called {
            Some(path) => path,
            None => undeleted(env::current_exe()?),
        };
        let mut words = vec!["--state-dir".into(), locations.state_dir.clone().into()];
        if let Some(config) = &locations.config {
            words.extend(["--config".into(), config.into()]);
        }
        if let Some(level) = log_level {
            words.extend(["--log-level".into(), level.into()]);
        }
        Ok(Self {
            path,
            options: words,
            watchdog,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Starts the daemon with all stored descriptors. `max_stored` is the most that can be stored,
    /// `last_end` says how the daemon before it ended.
    pub(super) fn start_daemon(
        &self,
        fds: &FdTable,
        max_stored: usize,
        inbox: &Path,
        last_end: Option<&str>,
    ) -> anyhow::Result<Pid> {
        let child = match self.spawn(self.path.as_os_str(), fds, max_stored, inbox, last_end) {
            // It is perhaps being replaced right now: the file that this process runs still exists.
            Err(error) if error.is_missing() => {
                self.spawn(OsStr::new(SELF), fds, max_stored, inbox, last_end)
            }
            result => result,
        };
        let id = child.map_err(|NotStarted(error)| error)?;
        i32::try_from(id)
            .ok()
            .and_then(Pid::from_raw)
            .context("the kernel gave a process no number")
    }

    fn spawn(
        &self,
        file: &OsStr,
        fds: &FdTable,
        max_stored: usize,
        inbox: &Path,
        last_end: Option<&str>,
    ) -> Result<u32, NotStarted> {
        let mut names = String::new();
        let mut mappings = Vec::with_capacity(fds.len());
        for (child_fd, (name, descriptor)) in (3..).zip(fds.iter()) {
            let parent_fd: OwnedFd = descriptor
                .try_clone_to_owned()
                .context("no descriptors are left to start embedshimd with")?;
            mappings.push(FdMapping {
                parent_fd,
                child_fd,
            });
            if child_fd > 3 {
                names.push(':');
            }
            names.push_str(name);
        }
        let mut command = Command::new(file);
        command
            .arg0(&self.path)
            .arg("serve")
            .args(&self.options)
            .env_remove("LISTEN_PID")
            .env("LISTEN_PPID", std::process::id().to_string())
            .env("LISTEN_FDS", fds.len().to_string())
            .env("LISTEN_FDNAMES", names)
            .env("NOTIFY_SOCKET", inbox)
            .env("FDSTORE", max_stored.to_string())
            .env(WATCHDOG_VARIABLE, self.watchdog.to_string())
            .env(
                "WATCHDOG_USEC",
                self.watchdog.saturating_mul(1_000_000).to_string(),
            )
            .env_remove("WATCHDOG_PID")
            .envs(last_end.map(|how| (PREDECESSOR, how)))
            .stdin(Stdio::null())
            // Ctrl-C is for the keeper alone, which then asks the daemon to leave.
            .process_group(0);
        command.fd_mappings(mappings).map_err(anyhow::Error::from)?;
        let child = command
            .spawn()
            .with_context(|| format!("cannot run {}", file.display()))?;
        Ok(child.id())
    }

    /// Becomes the next keeper by `execve`; returns only if that fails. `handover` is the
    /// descriptor of what this keeper has written down.
    pub(super) fn become_next(&self, handover: i32) -> io::Error {
        Command::new(&self.path)
            .arg0(&self.path)
            .arg("keep")
            .args(&self.options)
            .args(["--resume", &handover.to_string()])
            .env(WATCHDOG_VARIABLE, self.watchdog.to_string())
            .exec()
    }
}

/// Asks the program which format of the handover it understands: an `execve` that succeeds cannot
/// be undone. `spawn` starts it; `until_answered` is called repeatedly until it answers.
pub(super) fn check<C: DerefMut<Target = Child>>(
    path: &Path,
    spawn: impl Fn(&mut Command) -> io::Result<C>,
    mut until_answered: impl FnMut(),
) -> anyhow::Result<Format> {
    let mut refused = None;
    for format in Format::ALL {
        let status = ask(path, format, &spawn, &mut until_answered)?;
        if status.success() {
            return Ok(format);
        }
        refused = Some(status);
    }
    let status = refused.map_or_else(String::new, |status| format!(" ({status})"));
    bail!(
        "{} cannot take over from this keeper{status}",
        path.display()
    )
}

fn ask<C: DerefMut<Target = Child>>(
    path: &Path,
    format: Format,
    spawn: impl Fn(&mut Command) -> io::Result<C>,
    mut until_answered: impl FnMut(),
) -> anyhow::Result<ExitStatus> {
    let name = path.display();
    let mut command = Command::new(path);
    command
        .args(["keep", UNDERSTANDS, format.name()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = spawn(&mut command).with_context(|| format!("cannot run {name}"))?;
    let deadline = Instant::now() + ANSWER_LIMIT;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            bail!("{name} does not say within {ANSWER_LIMIT:?} that it can keep");
        }
        until_answered();
        std::thread::sleep(PAUSE);
    }
}

/// Why a program could not be started.
struct NotStarted(anyhow::Error);

impl NotStarted {
    fn is_missing(&self) -> bool {
        self.0
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
    }
}

impl From<anyhow::Error> for NotStarted {
    fn from(error: anyhow::Error) -> Self {
        Self(error)
    }
}

/// The path of this program as it was before its file was replaced: since then the kernel shows it
/// with a suffix.
fn undeleted(path: PathBuf) -> PathBuf {
    let text = path.to_str();
    text.and_then(|text| text.strip_suffix(" (deleted)"))
        .map(PathBuf::from)
        .unwrap_or(path)
}

fn is_self(path: &Path) -> bool {
    let file = FileId::behind(path);
    file.is_some() && file == FileId::behind(Path::new(SELF))
}

//! [`Program`]: the file that the daemon, and another keeper, are started from. Owns that it is looked for by its path each time, so
//! that a file that was replaced is used next.

use std::ffi::{OsStr, OsString};
use std::ops::DerefMut;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, io};

use anyhow::{Context, bail};
use command_fds::{CommandFdExt, FdMapping};
use rustix::process::Pid;

use super::handover::Format;
use super::stored_fds::Kept;
use crate::cli::{Keep, Locations, Serve, UNDERSTANDS, WATCHDOG, WATCHDOG_VARIABLE};

const SELF: &str = "/proc/self/exe";
/// How long a program may take to say that it can be the next keeper.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(5);

/// The program and what it is told.
#[derive(Debug)]
pub(super) struct Program {
    path: PathBuf,
    options: Vec<OsString>,
    /// In seconds; told by the environment, since not every version knows an option for it.
    watchdog: u64,
}

impl Program {
    /// Our own, by the name that we were called by if that is a path: a link may lead elsewhere after an upgrade.
    pub(super) fn own(options: &Keep) -> io::Result<Self> {
        let watchdog = options.watchdog;
        Self::with(&options.locations, options.log_level.as_deref(), watchdog)
    }

    /// The same of a daemon.
    pub(super) fn of_daemon(options: &Serve) -> io::Result<Self> {
        let watchdog = options.keeper_watchdog.unwrap_or(WATCHDOG);
        Self::with(&options.locations, options.log_level.as_deref(), watchdog)
    }

    fn with(locations: &Locations, log_level: Option<&str>, watchdog: u64) -> io::Result<Self> {
        let called = env::args_os().next().map(PathBuf::from);
        let called = called.filter(|path| path.is_absolute() && is_same(path, Path::new(SELF)));
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

    /// Starts the daemon with everything that is kept, and tells it the most that can be.
    pub(super) fn start_daemon(
        &self,
        kept: &Kept,
        most: usize,
        inbox: &Path,
    ) -> anyhow::Result<Pid> {
        let child = match self.spawn(self.path.as_os_str(), kept, most, inbox) {
            // It may be on its way to be replaced; the one we run is there still.
            Err(error) if error.is_not_there() => self.spawn(OsStr::new(SELF), kept, most, inbox),
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
        kept: &Kept,
        most: usize,
        inbox: &Path,
    ) -> Result<u32, NotStarted> {
        let mut names = String::new();
        let mut mappings = Vec::with_capacity(kept.len());
        for (child_fd, (name, descriptor)) in (3..).zip(kept.iter()) {
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
            .env("LISTEN_FDS", kept.len().to_string())
            .env("LISTEN_FDNAMES", names)
            .env("NOTIFY_SOCKET", inbox)
            .env("FDSTORE", most.to_string())
            .env(WATCHDOG_VARIABLE, self.watchdog.to_string())
            .env(
                "WATCHDOG_USEC",
                self.watchdog.saturating_mul(1_000_000).to_string(),
            )
            .env_remove("WATCHDOG_PID")
            .stdin(Stdio::null())
            // Ctrl-C is for us, who then end it in order.
            .process_group(0);
        command.fd_mappings(mappings).map_err(anyhow::Error::from)?;
        let child = command
            .spawn()
            .with_context(|| format!("cannot run {}", file.display()))?;
        Ok(child.id())
    }

    /// Becomes another keeper; returns only if that fails.
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

/// Asks the program in which format it can go on: an `execve` that succeeds cannot be taken back.
/// `meanwhile` is done again and again until it answers. `spawn` starts it.
pub(super) fn check<C: DerefMut<Target = Child>>(
    path: &Path,
    spawn: impl Fn(&mut Command) -> io::Result<C>,
    mut meanwhile: impl FnMut(),
) -> anyhow::Result<Format> {
    let mut refused = None;
    for format in Format::ALL {
        let status = ask(path, format, &spawn, &mut meanwhile)?;
        if status.success() {
            return Ok(format);
        }
        refused = Some(status);
    }
    let status = refused.map_or_else(String::new, |status| format!(" ({status})"));
    bail!(
        "{} cannot go on with what this keeper keeps{status}",
        path.display()
    )
}

fn ask<C: DerefMut<Target = Child>>(
    path: &Path,
    format: Format,
    spawn: impl Fn(&mut Command) -> io::Result<C>,
    mut meanwhile: impl FnMut(),
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
        meanwhile();
        std::thread::sleep(PAUSE);
    }
}

/// Why a program was not started.
struct NotStarted(anyhow::Error);

impl NotStarted {
    fn is_not_there(&self) -> bool {
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

/// As the kernel shows the path of a file that was replaced since.
fn undeleted(path: PathBuf) -> PathBuf {
    let text = path.to_str();
    text.and_then(|text| text.strip_suffix(" (deleted)"))
        .map(PathBuf::from)
        .unwrap_or(path)
}

fn is_same(one: &Path, other: &Path) -> bool {
    match (fs::metadata(one), fs::metadata(other)) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

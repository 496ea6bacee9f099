//! [`Place`]: makes sure that a daemon listens. Where none does, it starts `embedshimd keep`, which
//! starts the daemon and keeps it running, detached from containerd's session, process group and
//! environment (but in its cgroup). Owns the lock that lets one of many launchers do it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::failure::Failure;
use super::location;
use crate::state_dir;

/// How often to look whether the daemon listens by now; it takes about 30 ms to start.
const PAUSE: Duration = Duration::from_millis(5);
/// The exit code of `embedshimd` when another daemon works on the state directory. That daemon
/// creates its socket again when it notices that it was removed.
const ALREADY_RUNNING: i32 = 6;
/// The most bytes of the log's end that are shown.
const LOG_TAIL: u64 = 4096;

/// Where the daemon is.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) state_dir: PathBuf,
    pub(super) socket: PathBuf,
}

impl Place {
    pub(super) fn from_environment() -> Result<Self, Failure> {
        let state_dir = location::state_dir();
        let socket =
            location::socket(&state_dir).map_err(|error| Failure::Usage(error.to_string()))?;
        Ok(Self { state_dir, socket })
    }

    /// A connection to what listens: a daemon, or the keeper while it replaces one.
    pub(super) fn connect(&self) -> Option<UnixStream> {
        UnixStream::connect(&self.socket).ok()
    }

    /// Connects to a daemon, which is started if none listens, or fails after `limit`.
    pub(super) fn ensure_served(&self, limit: Duration) -> Result<UnixStream, Failure> {
        if let Some(stream) = self.connect() {
            return Ok(stream);
        }
        let deadline = Instant::now() + limit;
        make_state_dir(&self.state_dir)?;
        let _lock = lock(&self.state_dir.join("launch.lock"), deadline)?;
        if let Some(stream) = self.connect() {
            return Ok(stream);
        }
        let mut log = open_log(&self.state_dir.join("embedshimd.log"))?;
        let before = log.seek(SeekFrom::End(0)).unwrap_or(0);
        let mut child = self.spawn(&log)?;
        loop {
            if let Some(stream) = self.connect() {
                return Ok(stream);
            }
            if let Ok(Some(status)) = child.try_wait()
                && status.code() != Some(ALREADY_RUNNING)
            {
                return Err(Failure::Daemon(
                    last_line(&mut log, before).unwrap_or_else(|| status.to_string()),
                ));
            }
            if Instant::now() >= deadline {
                // It may still come up; the next launcher will find it then.
                return Err(Failure::Daemon(format!(
                    "it does not listen on {} yet",
                    self.socket.display()
                )));
            }
            sleep(PAUSE);
        }
    }

    fn spawn(&self, log: &File) -> Result<Child, Failure> {
        let program = program();
        let stream = |log: &File| log.try_clone().map(Stdio::from);
        let mut command = Command::new(&program);
        command
            .args(["keep", "--detached", "--state-dir"])
            .arg(&self.state_dir)
            .env_clear()
            .envs(environment())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(stream(log)?)
            .stderr(stream(log)?);
        command.spawn().map_err(|source| Failure::Path {
            doing: "cannot start",
            path: program,
            source,
        })
    }
}

/// The program of daemon and keeper: beside the launcher's own binary, or else on `PATH`.
fn program() -> PathBuf {
    const NAME: &str = "embedshimd";
    let beside = std::env::current_exe()
        .ok()
        .and_then(|own| Some(own.parent()?.join(NAME)));
    beside
        .filter(|path| path.is_file())
        .unwrap_or_else(|| NAME.into())
}

/// What the daemon gets of containerd's environment: what finds runc, and what is meant for
/// embedshim. Nothing else, `NOTIFY_SOCKET` and proxies least of all.
fn environment() -> impl Iterator<Item = (std::ffi::OsString, std::ffi::OsString)> {
    std::env::vars_os().filter(|(name, _)| {
        let name = name.to_string_lossy();
        name == "PATH" || name == "XDG_RUNTIME_DIR" || name.starts_with("EMBEDSHIM_")
    })
}

fn make_state_dir(path: &Path) -> Result<(), Failure> {
    let failed = |doing| {
        move |source| Failure::Path {
            doing,
            path: path.into(),
            source,
        }
    };
    state_dir::create(path).map_err(failed("cannot create the state directory"))?;
    state_dir::check(path).map_err(failed("cannot use the state directory"))
}

/// Takes the lock; waits for another launcher that is starting the daemon.
fn lock(path: &Path, deadline: Instant) -> Result<Flock<File>, Failure> {
    let failed = |source| Failure::Path {
        doing: "cannot lock",
        path: path.into(),
        source,
    };
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((file, Errno::EWOULDBLOCK)) if Instant::now() < deadline => file,
            Err((_, Errno::EWOULDBLOCK)) => return Err(failed(io::ErrorKind::TimedOut.into())),
            Err((_, errno)) => return Err(failed(errno.into())),
        };
        sleep(PAUSE);
    }
}

fn open_log(path: &Path) -> Result<File, Failure> {
    let opened = OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path);
    opened.map_err(|source| Failure::Path {
        doing: "cannot open the log",
        path: path.into(),
        source,
    })
}

/// The last line written after `before`.
fn last_line(log: &mut File, before: u64) -> Option<String> {
    let end = log.seek(SeekFrom::End(0)).ok()?;
    log.seek(SeekFrom::Start(before.max(end.saturating_sub(LOG_TAIL))))
        .ok()?;
    let mut tail = Vec::new();
    log.read_to_end(&mut tail).ok()?;
    let tail = String::from_utf8_lossy(&tail).into_owned();
    tail.lines()
        .rev()
        .map(str::trim)
        .find(|line| !line.is_empty())
        .map(str::to_owned)
}

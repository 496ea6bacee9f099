//! `binary://` loggers: a program of the client's that reads a process's output from pipes, as
//! nerdctl uses it. Owns how it is started, told to be ready, and ended; it outlives the daemon,
//! since only the process holds its pipes open.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use percent_encoding::percent_decode_str;
use tokio::io::Interest;
use tracing::warn;

use super::StdioError;
use super::non_blocking::set_non_blocking;
use crate::child_context::ChildContext;
use crate::process::{Process, ProcessIdentity};
use crate::reaper::Reaper;
use crate::sys;

/// How long a logger may take until it is ready. runc-v2 waits without end.
pub(crate) const READY: Duration = Duration::from_secs(30);
/// How long it may take to end after SIGTERM (`binaryIOProcTermTimeout` of runc-v2).
const TERM: Duration = Duration::from_secs(12);
/// The time between two looks at whether it has ended.
const PAUSE: Duration = Duration::from_millis(10);

/// A logger as a request names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Logger {
    program: PathBuf,
    arguments: Vec<OsString>,
    ready: Ready,
}

/// How it says that it is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ready {
    /// `binary://`: it closes the pipe; a byte before that does no harm.
    Closed,
    /// `binary-v2://`: it writes a byte. Without it, it has failed.
    Byte,
}

/// The process whose output a logger takes. Its environment is the first two, as runc-v2 gives it.
#[derive(Clone, Debug)]
pub(crate) struct LoggedProcess {
    /// The container, or for an exec the exec.
    pub(crate) id: String,
    /// The namespace.
    pub(crate) namespace: String,
    /// Its limits.
    pub(crate) context: ChildContext,
    /// Where it works.
    pub(crate) bundle: PathBuf,
}

/// The ends for the process's output.
#[derive(Debug)]
pub(crate) struct LoggerPipes {
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
}

impl Logger {
    /// Reads what follows `scheme://`: a path and a query whose keys and values become arguments.
    pub(super) fn parse(scheme: &str, rest: &str) -> Result<Self, StdioError> {
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let program = PathBuf::from(OsString::from_vec(percent_decode_str(path).collect()));
        if !program.is_absolute() {
            return Err(StdioError::WrongKind {
                stream: "stdout",
                path: program,
                what: "not the absolute path of a logger",
            });
        }
        let mut arguments = Vec::new();
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            arguments.push(OsString::from(key.into_owned()));
            if !value.is_empty() {
                arguments.push(value.into_owned().into());
            }
        }
        let ready = if scheme == "binary-v2" {
            Ready::Byte
        } else {
            Ready::Closed
        };
        Ok(Self {
            program,
            arguments,
            ready,
        })
    }

    /// Starts the logger. Blocks on the file system that its program is on.
    pub(crate) fn spawn(
        &self,
        process: &LoggedProcess,
        reaper: &Reaper,
    ) -> Result<Starting, StdioError> {
        let failed = |why| move |source| self.failed(why, source);
        let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(|errno| self.failed("no pipe", errno.into()));
        let (stdout_read, stdout) = pipe()?;
        let (stderr_read, stderr) = pipe()?;
        let (ready, ready_write) = pipe()?;
        let mut command = Command::new(&self.program);
        process.context.give(&mut command, &process.bundle);
        command
            .args(&self.arguments)
            .env_clear()
            .env("CONTAINER_ID", &process.id)
            .env("CONTAINER_NAMESPACE", &process.namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let descriptors = [(stdout_read, 3), (stderr_read, 4), (ready_write, 5)];
        let mapping = |(parent_fd, child_fd)| FdMapping {
            parent_fd,
            child_fd,
        };
        command
            .fd_mappings(descriptors.map(mapping).into())
            .map_err(|collision| {
                self.failed("cannot be given its pipes", io::Error::other(collision))
            })?;
        crate::program::touch(self.program.as_os_str(), None);
        let child = reaper
            .spawn(&mut command)
            .map_err(failed("cannot be started"))?;
        // Our copies of its ends: with them it would never see that it is alone, nor we that it is
        // ready.
        drop(command);
        let identity = Process::open(child.pid())
            .map_err(|error| self.failed("cannot be watched", io::Error::other(error)))?
            .identity();
        set_non_blocking(&ready).map_err(failed("cannot be waited for"))?;
        Ok(Starting {
            logger: self.clone(),
            pipes: LoggerPipes { stdout, stderr },
            identity,
            ready: Arc::new(ready),
        })
    }

    fn failed(&self, why: &str, source: io::Error) -> StdioError {
        StdioError::Logger {
            program: self.program.clone(),
            why: why.into(),
            source,
        }
    }

    /// A program that does not start in time, on a file system that does not answer, say.
    pub(crate) fn late(&self) -> StdioError {
        self.failed("is not ready", no_word())
    }
}

fn no_word() -> io::Error {
    io::Error::new(
        io::ErrorKind::TimedOut,
        format!("no word within {} s", READY.as_secs()),
    )
}

/// A logger that was started and has not said that it is ready.
#[derive(Debug)]
pub(crate) struct Starting {
    logger: Logger,
    pipes: LoggerPipes,
    identity: ProcessIdentity,
    ready: Arc<OwnedFd>,
}

impl Starting {
    /// Its process.
    pub(crate) fn identity(&self) -> ProcessIdentity {
        self.identity
    }

    /// Kills it: it has come too late.
    pub(crate) fn kill(&self) {
        signal(self.identity, libc::SIGKILL);
    }

    /// Waits until it is ready; it is killed if that takes too long. Holds no thread meanwhile.
    pub(crate) async fn ready(self) -> Result<LoggerPipes, StdioError> {
        let waited = tokio::time::timeout(READY, self.word()).await;
        match waited.unwrap_or_else(|_| Err(no_word())) {
            Ok(()) => Ok(self.pipes),
            Err(source) => {
                signal(self.identity, libc::SIGKILL);
                Err(self.logger.failed("is not ready", source))
            }
        }
    }

    async fn word(&self) -> io::Result<()> {
        let ready = sys::register(Arc::clone(&self.ready), Interest::READABLE)?;
        loop {
            let mut guard = ready.readable().await?;
            let read = guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut [0_u8; 1])?));
            match (read, self.logger.ready) {
                (Err(_not_yet), _) => {}
                (Ok(Ok(0)), Ready::Byte) => {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it has ended"));
                }
                (Ok(result), _) => return result.map(drop),
            }
        }
    }
}

/// Ends a logger as runc-v2 does: SIGTERM, and SIGKILL if that is not enough. Nothing happens to
/// one that has ended.
pub(crate) async fn end_logger(logger: ProcessIdentity) {
    let ended =
        || Process::reopen(logger).map_or(true, |process| process.has_ended().unwrap_or(true));
    let wait = async {
        while !ended() {
            tokio::time::sleep(PAUSE).await;
        }
    };
    signal(logger, libc::SIGTERM);
    if tokio::time::timeout(TERM, wait).await.is_err() {
        warn!(pid = logger.pid, "a logger does not end: killing it");
        signal(logger, libc::SIGKILL);
    }
}

fn signal(logger: ProcessIdentity, signal: i32) {
    if let Ok(process) = Process::reopen(logger) {
        // It may have ended by itself meanwhile.
        let _ = process.signal(signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_query_becomes_arguments() {
        let logger =
            Logger::parse("binary", "/usr/bin/log%20ger?_MARK=/var/lib%2Fx&flag&a=b+c").unwrap();
        assert_eq!(logger.program, PathBuf::from("/usr/bin/log ger"));
        assert_eq!(
            logger.arguments,
            ["_MARK", "/var/lib/x", "flag", "a", "b c"]
        );
        assert!(Logger::parse("binary", "relative").is_err());
    }

    #[test]
    fn a_logger_that_cannot_be_started_is_named() {
        let logger = Logger::parse("binary", "/nonexistent/logger").unwrap();
        let process = LoggedProcess {
            id: "c".into(),
            namespace: "n".into(),
            context: ChildContext::default(),
            bundle: "/".into(),
        };
        let error = logger.spawn(&process, &Reaper::default()).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/logger"), "{error}");
    }
}

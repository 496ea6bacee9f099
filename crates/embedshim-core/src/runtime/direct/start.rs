//! `start` without a process of runc: the init waits in opening a fifo to write, and goes on when
//! it is opened to read. Owns that an init is started only if runc would do no more than this.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;
use tracing::{debug, warn};

use super::known::ProgramId;
use super::state::State;
use super::sys::{self, Outcome};
use crate::failpoint;
use crate::process::Process;

/// runc's name for what an init waits at.
const FIFO: &CStr = c"exec.fifo";
const FIFO_NAME: &str = "exec.fifo";
/// How long a process that has started an init may take to note it.
const NOTED: Duration = Duration::from_secs(2);

/// The time between two looks at whether a start is over.
const PAUSE: Duration = Duration::from_millis(5);

/// What has become of a start.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Started {
    Yes,
    /// Nothing was done, or what is odd has to be told by runc.
    AskRunc,
    /// It may be started or not: the text says why that is not known.
    Unclear(String),
}

/// Starts the init of the container that runc has noted in this directory. Blocks for at most
/// `limit`.
pub(super) fn start(
    directory: &Path,
    id: &str,
    init: &Process,
    program: ProgramId,
    limit: Duration,
) -> Started {
    let Some(pidfd) = init.pidfd() else {
        return Started::AskRunc;
    };
    let state = State::read(directory, id, init.identity());
    let Some(state) = state.filter(State::is_start_plain) else {
        return Started::AskRunc;
    };
    let fifo = directory.join(FIFO_NAME);
    if !is_executed_by(init, program) {
        return if init.is_blocked_in(libc::SYS_openat) {
            Started::AskRunc
        } else {
            after_another(&fifo, init)
        };
    }
    if !lock(&state.directory, limit) {
        return Started::Unclear("another start of it does not end".into());
    }
    failpoint::step("before the init is let go on");
    let outcome = sys::open_read_and_remove(state.directory.as_fd(), FIFO, pidfd, limit);
    failpoint::step("after the init was let go on");
    match outcome {
        Ok(Some(Outcome::Started)) => Started::Yes,
        Ok(Some(Outcome::NotRemoved)) => {
            warn!(id, "cannot remove the fifo of a container that was started");
            Started::Yes
        }
        // Whatever it is, runc finds the words.
        Ok(Some(Outcome::NotOpened)) => Started::AskRunc,
        Ok(Some(Outcome::Silent)) => after_another(&fifo, init),
        Ok(Some(Outcome::Late)) => {
            let seconds = limit.as_secs();
            Started::Unclear(format!("the init did not go on within {seconds} s"))
        }
        Ok(None) => Started::Unclear("the process that lets the init go on was killed".into()),
        Err(error) => {
            debug!(id, %error, "cannot start a process: calling the OCI runtime");
            Started::AskRunc
        }
    }
}

/// Another process has let the init go on, or it has ended. runc finds the words for that when the
/// other has noted it, by the removal of the fifo. Before that, runc would take the init for one
/// that waits, and wait for it as long as it lives. Blocks.
fn after_another(fifo: &Path, init: &Process) -> Started {
    let give_up = Instant::now() + NOTED;
    while fifo.exists() && !init.has_ended().unwrap_or(true) {
        if Instant::now() >= give_up {
            return Started::Unclear("another process has let its init go on".into());
        }
        std::thread::sleep(PAUSE);
    }
    Started::AskRunc
}

/// Waits until no start that a predecessor has begun is in flight, for at most `limit`. Blocks.
pub(super) fn wait_until_over(directory: &Path, limit: Duration) {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    if let Ok(directory) = rustix::fs::open(directory, flags, Mode::empty()) {
        lock(&directory, limit);
    }
}

/// Locks runc's directory of the container: as long as a start is in flight it is locked, also when
/// the daemon is gone and its process goes on. False at the limit.
fn lock(directory: &OwnedFd, limit: Duration) -> bool {
    let give_up = Instant::now() + limit;
    loop {
        match flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if Instant::now() < give_up => std::thread::sleep(PAUSE),
            Err(Errno::WOULDBLOCK) => return false,
            // Where a file system knows no locks, there is no start in flight to be told of.
            _ => return true,
        }
    }
}

/// Whether the init still executes what runc makes of itself for its inits: a copy of its program.
/// Then nothing stands between that program and what this is to do as it does: no wrapper, nor an
/// upgrade since the creation.
fn is_executed_by(init: &Process, program: ProgramId) -> bool {
    let link = format!("/proc/{}/exe", init.identity().pid);
    let is_copy = std::fs::metadata(link).is_ok_and(|copy| copy.len() == program.size);
    // The link was read by number.
    is_copy && init.has_ended().is_ok_and(|has_ended| !has_ended)
}

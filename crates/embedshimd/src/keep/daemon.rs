//! [`Daemon`]: the daemon as its keeper sees it: it runs, or is started at some time. Owns how long
//! it may take to leave, and how long it may say nothing.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rustix::process::Pid;
use tracing::warn;

/// How long a daemon that was asked to leave may take: longer than it continues what is in flight.
const LEAVE_LIMIT: Duration = Duration::from_secs(30);

/// The daemon of a keeper.
#[derive(Debug)]
pub(super) enum Daemon {
    Running(Running),
    /// There is none; the next one is started at this time.
    Due(Instant),
}

/// A daemon that runs, and what it has said.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) pid: Pid,
    pub(super) since: Instant,
    pub(super) is_ready: bool,
    pub(super) was_ready: bool,
    /// When it is killed: it was asked to leave.
    kill_at: Option<Instant>,
    /// When it is killed unless it says again that it is alive; `None` before the first time.
    silent_at: Option<Instant>,
}

impl Daemon {
    pub(super) fn pid(&self) -> Option<Pid> {
        match self {
            Self::Running(running) => Some(running.pid),
            Self::Due(_) => None,
        }
    }

    /// The daemon, if it serves.
    pub(super) fn ready_pid(&self) -> Option<Pid> {
        match self {
            Self::Running(running) if running.is_ready => Some(running.pid),
            _ => None,
        }
    }

    /// When the keeper has to act on the daemon next.
    pub(super) fn due(&self) -> Option<Instant> {
        match self {
            Self::Running(running) => running.due(),
            Self::Due(due) => Some(*due),
        }
    }

    /// Asks the daemon to leave by this signal; it is killed if it does not within [`LEAVE_LIMIT`].
    pub(super) fn ask_to_leave(&mut self, with: Signal) {
        match self {
            Self::Running(running) => {
                send_signal(running.pid, with);
                running.kill_at.get_or_insert(Instant::now() + LEAVE_LIMIT);
            }
            // The operator has perhaps repaired what made it fail: it is started at once.
            Self::Due(due) => *due = Instant::now(),
        }
    }
}

impl Running {
    pub(super) fn new(pid: Pid, was_ready: bool) -> Self {
        Self {
            pid,
            since: Instant::now(),
            is_ready: false,
            was_ready,
            kill_at: None,
            silent_at: None,
        }
    }

    fn due(&self) -> Option<Instant> {
        self.kill_at.into_iter().chain(self.silent_at).min()
    }

    /// The daemon serves.
    pub(super) fn mark_ready(&mut self) {
        self.is_ready = true;
        self.was_ready = true;
    }

    /// The daemon has said that it is alive; it has to repeat that within `watchdog`.
    pub(super) fn mark_alive(&mut self, watchdog: Option<Duration>) {
        self.silent_at = watchdog.map(|period| Instant::now() + period);
    }

    /// Kills the daemon if one of its limits is over.
    pub(super) fn enforce_limits(&mut self, now: Instant) {
        let is_over = |due: Option<Instant>| due.is_some_and(|due| due <= now);
        let pid = self.pid.as_raw_nonzero();
        if is_over(self.kill_at) {
            warn!(pid, limit = ?LEAVE_LIMIT, "embedshimd does not leave: killing it");
        } else if is_over(self.silent_at) {
            warn!(pid, "embedshimd does not answer the watchdog: killing it");
        } else {
            return;
        }
        (self.kill_at, self.silent_at) = (None, None);
        send_signal(self.pid, Signal::SIGKILL);
    }
}

fn send_signal(pid: Pid, signal: Signal) {
    let pid = nix::unistd::Pid::from_raw(pid.as_raw_nonzero().get());
    // Fails only for a daemon that has ended already, which the keeper learns by SIGCHLD.
    let _ = nix::sys::signal::kill(pid, signal);
}

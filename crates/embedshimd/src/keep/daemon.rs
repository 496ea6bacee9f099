//! [`Daemon`]: the daemon as its keeper sees it: it runs, or is started at some time. Owns how long
//! it may take to leave, and how long it may say nothing.

use std::fmt;
use std::time::{Duration, Instant};

use embedshim_core::process::Process;
use nix::sys::signal::Signal;
use rustix::process::{Pid, WaitIdStatus};
use tracing::warn;

/// How long a daemon that was asked to leave may take: longer than it continues what is in flight.
const LEAVE_LIMIT: Duration = Duration::from_secs(30);

/// How long a daemon that was killed may take to end before it is looked at, and how long until it
/// is looked at again.
const END_LIMIT: Duration = Duration::from_secs(2);

/// A daemon that starts may say nothing for so many times the watchdog's period: 300 s by default.
const START_PERIODS: u32 = 10;

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
    /// When it is killed unless it says again that it is alive, or that its start goes on.
    silent_at: Option<Instant>,
    /// When it is looked at, since it was killed.
    look_at: Option<Instant>,
}

/// How a daemon has ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ended {
    Exited(i32),
    Killed(Option<i32>),
    /// Its program was killed, and its process ends when a file system answers: then it is a zombie
    /// that the keeper reaps.
    HeldUp,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "it exited with code {code}"),
            Self::Killed(Some(signal)) => write!(f, "it was killed by signal {signal}"),
            Self::Killed(None) => f.write_str("it was killed"),
            Self::HeldUp => f.write_str("it was killed, and a file system holds it up"),
        }
    }
}

impl Ended {
    pub(super) fn of(status: &WaitIdStatus) -> Self {
        status
            .exit_status()
            .map_or_else(|| Self::Killed(status.terminating_signal()), Self::Exited)
    }
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
    /// A daemon that was started this moment.
    pub(super) fn starting(pid: Pid, watchdog: Option<Duration>) -> Self {
        let now = Instant::now();
        Self {
            pid,
            since: now,
            is_ready: false,
            was_ready: false,
            kill_at: None,
            silent_at: watchdog.map(|period| now + period.saturating_mul(START_PERIODS)),
            look_at: None,
        }
    }

    /// The daemon of a former keeper, which has served.
    pub(super) fn serving(pid: Pid) -> Self {
        Self {
            was_ready: true,
            ..Self::starting(pid, None)
        }
    }

    fn due(&self) -> Option<Instant> {
        [self.kill_at, self.silent_at, self.look_at]
            .into_iter()
            .flatten()
            .min()
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

    /// The start goes on, and may take so long until the daemon says so again.
    pub(super) fn extend_start(&mut self, limit: Duration, watchdog: Option<Duration>) {
        if !self.is_ready && watchdog.is_some() {
            self.silent_at = Instant::now().checked_add(limit).max(self.silent_at);
        }
    }

    /// Kills the daemon if one of its limits is over.
    pub(super) fn enforce_limits(&mut self, now: Instant) {
        let is_over = |due: Option<Instant>| due.is_some_and(|due| due <= now);
        let pid = self.pid.as_raw_nonzero();
        if is_over(self.kill_at) {
            warn!(pid, limit = ?LEAVE_LIMIT, "embedshimd does not end: killing it");
        } else if is_over(self.silent_at) {
            warn!(pid, "embedshimd does not answer the watchdog: killing it");
        } else {
            return;
        }
        (self.kill_at, self.silent_at) = (None, None);
        send_signal(self.pid, Signal::SIGKILL);
        self.look_at = Some(now + END_LIMIT);
    }

    /// Whether the daemon was killed and is held up in its end, for longer than [`END_LIMIT`]: a
    /// file system that a thread of it waits for does not answer. Its program has ended.
    pub(super) fn is_held_up(&mut self, now: Instant) -> bool {
        if self.look_at.is_none_or(|look_at| now < look_at) {
            return false;
        }
        self.look_at = Some(now + END_LIMIT);
        let process = Process::open(self.pid.as_raw_nonzero().get());
        process.is_ok_and(|process| process.is_held_up_in_its_end())
    }
}

fn send_signal(pid: Pid, signal: Signal) {
    let pid = nix::unistd::Pid::from_raw(pid.as_raw_nonzero().get());
    // Fails only for a daemon that has ended already, which the keeper learns by SIGCHLD.
    let _ = nix::sys::signal::kill(pid, signal);
}

#[cfg(test)]
mod tests {
    use super::*;

    const WATCHDOG: Option<Duration> = Some(Duration::from_secs(30));

    fn left(running: &Running) -> Option<u64> {
        let left = running.due()?.saturating_duration_since(running.since);
        // Rounded: some instants are not the same.
        Some((left + Duration::from_millis(500)).as_secs())
    }

    #[test]
    fn a_start_that_goes_on_is_not_killed_and_one_that_stands_still_is() {
        let pid = Pid::from_raw(i32::MAX).unwrap();
        let mut running = Running::starting(pid, WATCHDOG);
        assert_eq!(left(&running), Some(300));
        running.extend_start(Duration::from_secs(400), WATCHDOG);
        assert_eq!(left(&running), Some(400));
        // It is never shortened.
        running.extend_start(Duration::ZERO, WATCHDOG);
        assert_eq!(left(&running), Some(400));
        running.mark_ready();
        running.extend_start(Duration::from_secs(1000), WATCHDOG);
        running.mark_alive(WATCHDOG);
        assert_eq!(left(&running), Some(30));
        for mut unlimited in [Running::starting(pid, None), Running::serving(pid)] {
            unlimited.extend_start(Duration::from_secs(1), None);
            assert_eq!(left(&unlimited), None);
        }
    }
}

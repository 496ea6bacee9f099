//! [`Running`]: the daemon that runs. Owns how long it may take to leave, and may say nothing.

use std::time::Instant;

use nix::sys::signal::Signal;
use rustix::process::Pid;
use tracing::warn;

/// The daemon, and what it has said.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) pid: Pid,
    pub(super) since: Instant,
    pub(super) is_ready: bool,
    pub(super) was_ready: bool,
    /// It was asked to leave, and has until then.
    pub(super) kill_at: Option<Instant>,
    /// It has said that it is alive, and has to say so again before this.
    pub(super) silent_at: Option<Instant>,
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

    /// When to look at it again.
    pub(super) fn due(&self) -> Option<Instant> {
        self.kill_at.into_iter().chain(self.silent_at).min()
    }

    /// Kills it if it has had its time.
    pub(super) fn enforce(&mut self, now: Instant) {
        let is_over = |due: Option<Instant>| due.is_some_and(|due| due <= now);
        let pid = self.pid.as_raw_nonzero();
        if is_over(self.kill_at) {
            warn!(pid, "embedshimd does not leave; killing it");
        } else if is_over(self.silent_at) {
            warn!(pid, "embedshimd stands still; killing it");
        } else {
            return;
        }
        (self.kill_at, self.silent_at) = (None, None);
        signal(self.pid, Signal::SIGKILL);
    }
}

/// Sends a signal to the daemon.
pub(super) fn signal(pid: Pid, signal: Signal) {
    let pid = nix::unistd::Pid::from_raw(pid.as_raw_nonzero().get());
    // It fails for one that has ended already, which is noticed in its own time.
    let _ = nix::sys::signal::kill(pid, signal);
}

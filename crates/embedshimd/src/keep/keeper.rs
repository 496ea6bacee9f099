//! [`Keeper`]: the loop of a keeper, and what it does when a datagram or a signal comes or the
//! daemon ends. Never gives up a descriptor before the daemon says so.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use embedshim_core::chain;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use tracing::{error, info, warn};

use super::backoff::Backoff;
use super::daemon::{Daemon, Ended, Running};
use super::fd_table::{FdTable, max_stored};
use super::files::Files;
use super::handover;
use super::inbox::{MAX_MESSAGE, Received};
use super::program::{self, Program};
use super::zombies::Zombies;
use crate::outcome::Code;
use crate::service_manager::message::Message;
use crate::state_dir::lock;
use crate::sys;

/// How long to wait after a system call has failed that cannot fail: memory is short, perhaps.
const PAUSE: Duration = Duration::from_millis(100);
/// The most datagrams that are handled in a row: a flood of them does not hide the daemon's end.
const MAX_DATAGRAMS: usize = 10_000;

/// What does not change while this process is the keeper.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) program: Program,
    /// How long a daemon may not say that it is alive; `None`: for any time.
    pub(super) watchdog: Option<Duration>,
    pub(super) signals: SignalFd,
    /// How many descriptors this process can have.
    pub(super) limit: u64,
}

/// The keeper.
#[derive(Debug)]
pub(super) struct Keeper {
    parts: Parts,
    files: Files,
    fds: FdTable,
    daemon: Daemon,
    zombies: Zombies,
    backoff: Backoff,
    /// A daemon of this keeper or of its predecessor has served.
    was_ever_ready: bool,
    /// The keeper was asked to end, and waits for its daemon.
    is_ending: bool,
    /// How the last daemon ended, for the next one.
    last_end: Option<String>,
    refusals: Refusals,
}

/// Upgrades that were refused.
#[derive(Debug, Default)]
struct Refusals {
    count: u32,
    last_reason: String,
}

impl Keeper {
    pub(super) fn new(parts: Parts, files: Files, fds: FdTable, zombies: Zombies) -> Self {
        Self {
            parts,
            files,
            fds,
            daemon: Daemon::Due(Instant::now()),
            zombies,
            backoff: Backoff::default(),
            was_ever_ready: false,
            is_ending: false,
            last_end: None,
            refusals: Refusals::default(),
        }
    }

    /// Takes over the daemon of another keeper, and replaces it.
    pub(super) fn replace_daemon(&mut self, pid: Option<i32>) {
        self.was_ever_ready = true;
        self.write_status();
        if let Some(pid) = pid.and_then(Pid::from_raw) {
            self.daemon = Daemon::Running(Running::serving(pid));
            self.daemon.ask_to_leave(Signal::SIGTERM);
        }
        info!(
            version = lock::VERSION,
            stored = self.fds.len(),
            "keeper replaced"
        );
    }

    /// Keeps the daemon running until the keeper is told to end. No failure ends it.
    pub(super) fn run(&mut self) -> Code {
        loop {
            let now = Instant::now();
            if let Some(code) = self.check_daemon(now) {
                return code;
            }
            self.zombies.reap(now, self.daemon.pid());
            if let Err(errno) = self.wait(now) {
                warn!(%errno, "cannot wait for datagrams: trying again");
                std::thread::sleep(PAUSE);
            }
            self.handle_datagrams();
            if let Err(errno) = self.handle_signals() {
                warn!(%errno, "cannot read signals: trying again");
                std::thread::sleep(PAUSE);
            }
        }
    }

    /// Sleeps until a datagram or a signal comes, or something is due.
    fn wait(&self, now: Instant) -> nix::Result<()> {
        let due = self.daemon.due().into_iter().chain(self.zombies.due());
        let timeout = due.min().map_or(PollTimeout::NONE, |due| {
            // Rounded up: otherwise the loop would spin within the last millisecond.
            let left = due.saturating_duration_since(now) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut polled = [
            readable(self.files.inbox().socket.as_fd()),
            readable(self.parts.signals.as_fd()),
        ];
        match poll(&mut polled, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Starts a daemon that is due, or notices that it has ended. A code ends the keeper, too.
    fn check_daemon(&mut self, now: Instant) -> Option<Code> {
        match &mut self.daemon {
            Daemon::Due(_) if self.is_ending => return Some(Code::Ok),
            Daemon::Due(due) if *due <= now => return self.start_daemon(),
            Daemon::Due(_) => {}
            Daemon::Running(running) => {
                let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
                match waitid(WaitId::Pid(running.pid), options) {
                    Ok(None) => {
                        running.enforce_limits(now);
                        if running.is_held_up(now) {
                            return self.daemon_ended(Ended::HeldUp);
                        }
                    }
                    Ok(Some(status)) => return self.daemon_ended(Ended::of(&status)),
                    Err(errno) => {
                        let pid = running.pid.as_raw_nonzero();
                        error!(
                            pid,
                            %errno,
                            "embedshimd is no child of its keeper: starting another"
                        );
                        self.daemon = Daemon::Due(now);
                    }
                }
            }
        }
        None
    }

    /// Starts the daemon, or notes when to try again. A code ends the keeper: its first daemon
    /// could not be started.
    fn start_daemon(&mut self) -> Option<Code> {
        self.zombies.leave_alone();
        // The next daemon and `embedshimd upgrade` look for the keeper's files.
        self.recreate_lock();
        self.files.recreate_inbox();
        let started = self.parts.program.start_daemon(
            &self.fds,
            max_stored(self.parts.limit),
            self.files.inbox_path(),
            self.last_end.as_deref(),
        );
        self.daemon = match started {
            Ok(pid) => Daemon::Running(Running::starting(pid, self.parts.watchdog)),
            Err(failure) => {
                error!("cannot start embedshimd: {}", chain(failure.as_ref()));
                if !self.was_ever_ready {
                    return Some(Code::Failed);
                }
                Daemon::Due(Instant::now() + self.backoff.pause(Duration::ZERO, false))
            }
        };
        sys::trim_heap();
        None
    }

    fn recreate_lock(&mut self) {
        if self.files.recreate_lock() {
            self.write_status();
        }
    }

    /// The daemon has ended: another one is due. A code ends the keeper, too.
    fn daemon_ended(&mut self, how: Ended) -> Option<Code> {
        // What it stored last is perhaps still in the socket, and its successor needs it.
        self.handle_datagrams();
        let Daemon::Running(running) = &self.daemon else {
            return None;
        };
        let pid = running.pid.as_raw_nonzero();
        self.last_end = Some(how.to_string());
        self.zombies.leave_alone();
        if !self.was_ever_ready && !self.is_ending {
            // It has logged why, and nothing is logged after that: the launcher shows the last
            // line.
            return Some(match how {
                Ended::Exited(code) => Code::from_number(code),
                Ended::Killed(_) | Ended::HeldUp => Code::Failed,
            });
        }

        // How long to wait for the next one.
        let now = Instant::now();
        let lived = now.saturating_duration_since(running.since);
        let mut pause = self.backoff.pause(lived, running.was_ready);
        match how {
            Ended::Exited(0) => {
                pause = Duration::ZERO;
                info!(pid, "embedshimd has ended");
            }
            Ended::Exited(code) => warn!(pid, code, again_in = ?pause, "embedshimd has failed"),
            Ended::Killed(signal) => warn!(pid, signal, again_in = ?pause, "embedshimd was killed"),
            Ended::HeldUp => warn!(
                pid,
                again_in = ?pause,
                "embedshimd was killed, and is held up by a file system that does not answer: \
                 starting another"
            ),
        }
        self.daemon = Daemon::Due(now + pause);
        self.write_status();
        if self.is_ending {
            return Some(Code::Ok);
        }
        if pause.is_zero() {
            return self.start_daemon();
        }
        None
    }

    fn handle_signals(&mut self) -> nix::Result<()> {
        while let Some(taken) = self.parts.signals.read_signal()? {
            let number = i32::try_from(taken.ssi_signo).unwrap_or(0);
            match Signal::try_from(number) {
                Ok(Signal::SIGCHLD) => self.look_for_zombies(),
                Ok(Signal::SIGHUP) => self.daemon.ask_to_leave(Signal::SIGHUP),
                Ok(Signal::SIGUSR2) if !self.is_ending => self.upgrade(),
                Ok(Signal::SIGTERM | Signal::SIGINT) => {
                    self.is_ending = true;
                    self.daemon.ask_to_leave(Signal::SIGTERM);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn look_for_zombies(&mut self) {
        if let Some(pid) = self.daemon.ready_pid() {
            self.zombies.look(Instant::now(), Some(pid));
        }
    }

    /// Becomes the keeper of the binary that is on disk now, which then replaces the daemon. If
    /// that fails, this keeper continues as before.
    fn upgrade(&mut self) {
        let path = self.parts.program.path().to_owned();
        let refused = match program::check(
            &path,
            |command| command.spawn().map(Box::new),
            || self.handle_datagrams(),
        ) {
            Ok(format) => self.become_next(format),
            Err(error) => error,
        };
        let reason = format!("{refused:#}");
        error!(program = %path.display(), "the keeper is not replaced: {reason}");
        self.refusals.count = self.refusals.count.saturating_add(1);
        self.refusals.last_reason = reason.replace('\n', " ");
        self.write_status();
    }

    /// Becomes the next keeper by `execve`; returns only if that fails.
    fn become_next(&self, format: handover::Format) -> anyhow::Error {
        let daemon = self.daemon.pid().map(Pid::as_raw_pid);
        let files = self.files.descriptors();
        match handover::Open::new(format, files, daemon, &self.fds, &self.zombies) {
            Ok(open) => self.parts.program.become_next(open.number()).into(),
            Err(error) => error,
        }
    }

    /// Writes into the lock file whether the daemon serves and how the last upgrade was refused,
    /// for `embedshimd upgrade` and for an operator.
    fn write_status(&self) {
        let mut status = String::new();
        if let Some(pid) = self.daemon.ready_pid() {
            status = format!("daemon {}\n", pid.as_raw_nonzero());
        }
        let Refusals { count, last_reason } = &self.refusals;
        if *count > 0 {
            status = format!("{status}refused {count} {last_reason}\n");
        }
        self.files.write_status(&status);
    }

    /// Handles every datagram that is in the socket.
    fn handle_datagrams(&mut self) {
        let mut buffer = [0; MAX_MESSAGE];
        let mut ignored = 0;
        let mut reason = String::new();
        for _ in 0..MAX_DATAGRAMS {
            let handled = match self.files.inbox().receive(&mut buffer) {
                Ok(None) => break,
                Ok(Some(received)) => {
                    let bytes = buffer.get(..received.length).unwrap_or_default();
                    self.handle(bytes, received)
                }
                Err(error) => Err(error.to_string()),
            };
            if let Err(why) = handled {
                ignored += 1;
                reason = why;
            }
        }
        if ignored > 0 {
            warn!(ignored, "ignoring datagrams, the last because {reason}");
        }
    }

    /// Handles one datagram; an error says why it is ignored.
    fn handle(&mut self, bytes: &[u8], received: Received) -> Result<(), String> {
        let daemon = received.check_sender(self.daemon.pid())?;
        let Daemon::Running(running) = &mut self.daemon else {
            return Ok(());
        };
        match Message::parse(bytes).ok_or("it is not of this protocol")? {
            Message::Store(name) => self.store(name, received),
            Message::Remove(name) => self.fds.remove(name),
            Message::Reap { pid, start_ticks } => {
                if pid != daemon.as_raw_nonzero().get() {
                    self.zombies.reap_one(pid, start_ticks);
                }
            }
            Message::Ready => {
                running.mark_ready();
                self.was_ever_ready = true;
                info!(
                    daemon = daemon.as_raw_nonzero(),
                    stored = self.fds.len(),
                    "embedshimd is ready"
                );
                self.write_status();
                self.look_for_zombies();
            }
            Message::Stopping => {
                running.is_ready = false;
                self.zombies.leave_alone();
                self.write_status();
            }
            Message::Alive => running.mark_alive(self.parts.watchdog),
            Message::ExtendStart { microseconds } => {
                running.extend_start(Duration::from_micros(microseconds), self.parts.watchdog);
            }
            Message::Reaped { pid } => {
                let text = self.zombies.reaped(pid);
                for pipe in received.descriptors {
                    // An empty pipe takes all of it at once. It fails if the daemon has ended.
                    let _ = rustix::io::write(&pipe, text.as_bytes());
                }
            }
            Message::RecreateFiles => self.recreate_lock(),
            // The pipe of a barrier is closed right here, after all datagrams before it.
            Message::Barrier | Message::Status(_) | Message::Other => {}
        }
        Ok(())
    }

    /// Stores the descriptors of a datagram.
    fn store(&mut self, name: &str, received: Received) {
        const LOST: &str = "it is lost when the daemon ends";
        if received.lacks_descriptors {
            error!(
                name,
                "cannot store a descriptor: this process can have no more; {LOST}"
            );
        }
        for descriptor in received.descriptors {
            if let Err(full) = self.fds.insert(name, descriptor, self.parts.limit) {
                error!(name, "cannot store a descriptor: {full}; {LOST}");
            }
        }
    }
}

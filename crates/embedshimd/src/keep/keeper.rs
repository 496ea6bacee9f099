//! [`Keeper`]: the loop, and what happens when a datagram or a signal comes or the daemon ends.
//! Never gives up a descriptor before the daemon says so.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use embedshim_core::chain;
use nix::fcntl::Flock;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use rustix::process::{Pid, WaitId, WaitIdOptions, WaitIdStatus, waitid};
use tracing::{error, info, warn};

use super::backoff::Backoff;
use super::handover;
use super::inbox::{Inbox, MAX_MESSAGE, Received};
use super::program::{self, Program};
use super::running::{Running, signal};
use super::stored_fds::{Kept, most};
use super::zombies::Zombies;
use crate::outcome::Code;
use crate::service_manager::message::Message;
use crate::state_dir::claim::Claim;
use crate::state_dir::lock;
use crate::sys;

/// How long a daemon that was asked to leave may take; longer than it gives to what is under way.
const LEAVE_LIMIT: Duration = Duration::from_secs(30);
/// After something that cannot fail has failed: memory is short, perhaps.
const PAUSE: Duration = Duration::from_millis(100);
/// Datagrams handled before we look at anything else: nobody's flood keeps us from the daemon's
/// end.
const AT_ONCE: usize = 10_000;

/// What does not change.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) program: Program,
    pub(super) inbox_path: PathBuf,
    /// For how long a daemon may not say that it is alive.
    pub(super) watchdog: Option<Duration>,
    pub(super) signals: SignalFd,
    /// How many descriptors this process can have.
    pub(super) limit: u64,
}

/// The keeper.
#[derive(Debug)]
pub(super) struct Keeper {
    parts: Parts,
    lock: Flock<File>,
    _claim: Claim,
    inbox: Inbox,
    kept: Kept,
    daemon: Daemon,
    zombies: Zombies,
    backoff: Backoff,
    was_ever_ready: bool,
    is_ending: bool,
    /// Upgrades that were refused, and why the last one was.
    refusals: u32,
    refusal: String,
}

#[derive(Debug)]
enum Daemon {
    Running(Running),
    /// To be started then.
    Due(Instant),
}

impl Keeper {
    pub(super) fn new(
        parts: Parts,
        (lock, claim): (Flock<File>, Claim),
        inbox: Inbox,
        kept: Kept,
        zombies: Zombies,
    ) -> Self {
        Self {
            parts,
            lock,
            _claim: claim,
            inbox,
            kept,
            daemon: Daemon::Due(Instant::now()),
            zombies,
            backoff: Backoff::default(),
            was_ever_ready: false,
            is_ending: false,
            refusals: 0,
            refusal: String::new(),
        }
    }

    /// Takes over another keeper's daemon, to replace it by another.
    pub(super) fn replace(&mut self, daemon: Option<i32>) {
        self.was_ever_ready = true;
        self.tell();
        if let Some(pid) = daemon.and_then(Pid::from_raw) {
            self.daemon = Daemon::Running(Running::new(pid, true));
            self.ask_to_leave(Signal::SIGTERM);
        }
        info!(
            version = lock::VERSION,
            kept = self.kept.len(),
            "keeper replaced"
        );
    }

    /// Keeps until it is told to end. Nothing that fails meanwhile ends it.
    pub(super) fn run(&mut self) -> Code {
        loop {
            let now = Instant::now();
            if let Some(code) = self.look_after_daemon(now) {
                return code;
            }
            let daemon = self.daemon_pid();
            self.zombies.reap(now, daemon);
            if let Err(errno) = self.wait(now) {
                warn!(%errno, "cannot wait for datagrams; trying again");
                std::thread::sleep(PAUSE);
            }
            self.drain();
            if let Err(errno) = self.take_signals() {
                warn!(%errno, "cannot read signals; trying again");
                std::thread::sleep(PAUSE);
            }
        }
    }

    fn daemon_pid(&self) -> Option<Pid> {
        match &self.daemon {
            Daemon::Running(running) => Some(running.pid),
            Daemon::Due(_) => None,
        }
    }

    /// Sleeps until something happens or is due.
    fn wait(&self, now: Instant) -> nix::Result<()> {
        let of_daemon = match &self.daemon {
            Daemon::Running(running) => running.due(),
            Daemon::Due(due) => Some(*due),
        };
        let due = of_daemon.into_iter().chain(self.zombies.due()).min();
        let timeout = due.map_or(PollTimeout::NONE, |due| {
            // Rounded up, or we would look again and again within the last millisecond.
            let left = due.saturating_duration_since(now) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut polled = [
            readable(self.inbox.socket.as_fd()),
            readable(self.parts.signals.as_fd()),
        ];
        match poll(&mut polled, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Starts the daemon, or learns of its end. A code ends the keeper too.
    fn look_after_daemon(&mut self, now: Instant) -> Option<Code> {
        match &mut self.daemon {
            Daemon::Due(_) if self.is_ending => return Some(Code::Ok),
            Daemon::Due(due) if *due <= now => return self.start_daemon(),
            Daemon::Due(_) => {}
            Daemon::Running(running) => {
                let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
                match waitid(WaitId::Pid(running.pid), options) {
                    Ok(None) => running.enforce(now),
                    Ok(Some(status)) => return self.ended(&status),
                    Err(errno) => {
                        error!(%errno, "embedshimd is not our child any more");
                        self.daemon = Daemon::Due(now);
                    }
                }
            }
        }
        None
    }

    /// Starts it, or notes when to try again. A code ends the keeper, whose first daemon this would
    /// have been.
    fn start_daemon(&mut self) -> Option<Code> {
        self.zombies.leave_alone();
        self.be_found();
        let started = self.parts.program.start_daemon(
            &self.kept,
            most(self.parts.limit),
            &self.parts.inbox_path,
        );
        self.daemon = match started {
            Ok(pid) => Daemon::Running(Running::new(pid, false)),
            Err(failure) => {
                error!("embedshimd is not started: {}", chain(failure.as_ref()));
                if !self.was_ever_ready {
                    return Some(Code::Failed);
                }
                Daemon::Due(Instant::now() + self.backoff.pause(Duration::ZERO, false))
            }
        };
        sys::trim_heap();
        None
    }

    /// Makes our files again, should they have been removed with the state directory: the next
    /// daemon and `embedshimd upgrade` look for them.
    fn be_found(&mut self) {
        self.restore_lock();
        if self.parts.inbox_path.symlink_metadata().is_ok() {
            return;
        }
        match Inbox::open(&self.parts.inbox_path) {
            Ok(inbox) => self.inbox = inbox,
            Err(error) => error!(%error, "the keeper's socket cannot be made again"),
        }
    }

    /// A daemon that runs needs no more: its socket is connected to ours, wherever that was.
    fn restore_lock(&mut self) {
        let state_dir = self.parts.inbox_path.parent().unwrap_or(Path::new("/"));
        let path = lock::of_keeper(state_dir);
        if lock::is_at(&self.lock, &path) {
            return;
        }
        match lock::take(state_dir, &path) {
            Ok(Some(lock)) => self.lock = lock,
            Ok(None) => return error!("another keeper has taken the state directory"),
            Err(failure) => {
                let failure = chain(failure.as_ref());
                return error!("the keeper's lock cannot be made again: {failure}");
            }
        }
        self.tell();
    }

    fn ended(&mut self, status: &WaitIdStatus) -> Option<Code> {
        // What it had kept last is perhaps in the socket still, and its successor needs it.
        self.drain();
        let Daemon::Running(running) = &self.daemon else {
            return None;
        };
        let pid = running.pid.as_raw_nonzero();
        self.zombies.leave_alone();
        if !self.was_ever_ready && !self.is_ending {
            // It has said why, and nothing is said after it: the launcher shows the last line.
            return Some(status.exit_status().map_or(Code::Failed, Code::from_number));
        }
        let now = Instant::now();
        let mut pause = self.backoff.pause(
            now.saturating_duration_since(running.since),
            running.was_ready,
        );
        match (status.exit_status(), status.terminating_signal()) {
            (Some(0), _) => {
                pause = Duration::ZERO;
                info!(pid, "embedshimd has left");
            }
            (Some(code), _) => warn!(pid, code, again_in = ?pause, "embedshimd has failed"),
            (None, signal) => warn!(pid, signal, again_in = ?pause, "embedshimd was killed"),
        }
        self.daemon = Daemon::Due(now + pause);
        self.tell();
        if self.is_ending {
            return Some(Code::Ok);
        }
        if pause.is_zero() {
            return self.start_daemon();
        }
        None
    }

    /// Asks the daemon to leave, and kills it if it does not.
    fn ask_to_leave(&mut self, with: Signal) {
        match &mut self.daemon {
            Daemon::Running(running) => {
                signal(running.pid, with);
                running.kill_at.get_or_insert(Instant::now() + LEAVE_LIMIT);
            }
            // Whoever asks has perhaps repaired what made it fail.
            Daemon::Due(due) => *due = Instant::now(),
        }
    }

    fn take_signals(&mut self) -> nix::Result<()> {
        while let Some(taken) = self.parts.signals.read_signal()? {
            let number = i32::try_from(taken.ssi_signo).unwrap_or(0);
            match Signal::try_from(number) {
                Ok(Signal::SIGCHLD) => self.look_for_zombies(),
                Ok(Signal::SIGHUP) => self.ask_to_leave(Signal::SIGHUP),
                Ok(Signal::SIGUSR2) if !self.is_ending => self.upgrade(),
                Ok(Signal::SIGTERM | Signal::SIGINT) => {
                    self.is_ending = true;
                    self.ask_to_leave(Signal::SIGTERM);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn look_for_zombies(&mut self) {
        if let Daemon::Running(running) = &self.daemon
            && running.is_ready
        {
            self.zombies.look(Instant::now(), Some(running.pid));
        }
    }

    /// Becomes the keeper of the binary that is on disk now; the daemon follows. Goes on as before
    /// if that cannot be.
    fn upgrade(&mut self) {
        let path = self.parts.program.path().to_owned();
        let refused = match program::check(
            &path,
            |command| command.spawn().map(Box::new),
            || self.drain(),
        ) {
            Ok(format) => self.become_next(format),
            Err(error) => error,
        };
        let text = format!("{refused:#}");
        error!("the keeper is not replaced: {text}");
        self.refusals = self.refusals.saturating_add(1);
        self.refusal = text;
        self.tell();
    }

    fn become_next(&self, format: handover::Format) -> anyhow::Error {
        let daemon = self.daemon_pid().map(Pid::as_raw_pid);
        let ends: (BorrowedFd<'_>, BorrowedFd<'_>) = (self.inbox.socket.as_fd(), self.lock.as_fd());
        let open = handover::Open::new(format, ends, daemon, &self.kept, &self.zombies);
        match open {
            Ok(open) => self.parts.program.become_next(open.number()).into(),
            Err(error) => error,
        }
    }

    /// Writes down who we are and whether the daemon serves, for `embedshimd upgrade` and for who
    /// looks.
    fn tell(&self) {
        let mut more = String::new();
        if let Daemon::Running(running) = &self.daemon
            && running.is_ready
        {
            more = format!("daemon {}\n", running.pid.as_raw_nonzero());
        }
        if self.refusals > 0 {
            let refusal = self.refusal.replace('\n', " ");
            more = format!("{more}refused {} {refusal}\n", self.refusals);
        }
        if let Err(error) = lock::write(&self.lock, &more) {
            warn!(%error, "cannot write keeper.lock");
        }
    }

    /// Handles every datagram that is there.
    fn drain(&mut self) {
        let mut buffer = [0; MAX_MESSAGE];
        let mut ignored = 0;
        let mut why = String::new();
        for _ in 0..AT_ONCE {
            match self.inbox.receive(&mut buffer) {
                Ok(None) => break,
                Ok(Some(received)) => {
                    let bytes = buffer.get(..received.length).unwrap_or_default();
                    if let Err(reason) = self.handle(bytes, received) {
                        ignored += 1;
                        why = reason;
                    }
                }
                Err(error) => {
                    ignored += 1;
                    why = error.to_string();
                }
            }
        }
        if ignored > 0 {
            warn!(ignored, "datagrams are ignored, the last because {why}");
        }
    }

    /// Handles one; an error says why it is ignored.
    fn handle(&mut self, bytes: &[u8], received: Received) -> Result<(), String> {
        let sender = received.sender.ok_or("it has no sender")?;
        let own = nix::unistd::geteuid().as_raw();
        if sender.uid.as_raw() != own {
            return Err(format!("user {} sent it", sender.uid.as_raw()));
        }
        let process = sender.pid.as_raw_nonzero();
        let Daemon::Running(running) = &mut self.daemon else {
            return Err(format!("process {process} sent it, and no daemon runs"));
        };
        if sender.pid != running.pid {
            return Err(format!(
                "process {process} sent it, which is not the daemon"
            ));
        }
        if received.is_truncated {
            return Err(format!("it is longer than {MAX_MESSAGE} bytes"));
        }
        match Message::parse(bytes).ok_or("it is not of this protocol")? {
            Message::Store(name) => {
                if received.lacks_descriptors {
                    error!(
                        name,
                        "not kept, since no descriptor is left: it is lost when the daemon ends"
                    );
                }
                for descriptor in received.descriptors {
                    if let Err(full) = self.kept.insert(name, descriptor, self.parts.limit) {
                        error!(name, "not kept: {full}; it is lost when the daemon ends");
                    }
                }
            }
            Message::Remove(name) => self.kept.remove(name),
            Message::Reap { pid, start_ticks } => {
                if pid != running.pid.as_raw_nonzero().get() {
                    self.zombies.reap_one(pid, start_ticks);
                }
            }
            Message::Ready => {
                running.is_ready = true;
                running.was_ready = true;
                self.was_ever_ready = true;
                info!(
                    daemon = process.get(),
                    kept = self.kept.len(),
                    "embedshimd is ready"
                );
                self.tell();
                self.look_for_zombies();
            }
            Message::Stopping => {
                running.is_ready = false;
                self.zombies.leave_alone();
                self.tell();
            }
            Message::Alive => {
                running.silent_at = self.parts.watchdog.map(|period| Instant::now() + period);
            }
            Message::Reaped { pid } => {
                let text = self.zombies.reaped(pid);
                for pipe in received.descriptors {
                    // Fresh and empty, it takes all of it at once; and who asks may have gone.
                    let _ = rustix::io::write(&pipe, text.as_bytes());
                }
            }
            Message::Restore => self.restore_lock(),
            // What came with it is closed right here, after all before it.
            Message::Barrier | Message::Other => {}
        }
        Ok(())
    }
}

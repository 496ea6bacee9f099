//! The signals that daemon and keeper act on. Owns which ones they are, and that none that was
//! blocked before this process started stays blocked in a container.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use signal_hook::flag;
use tokio::signal::unix::{Signal as Received, SignalKind, signal};

/// Those that a keeper reads: children that ended, and what an operator asks for.
const OF_KEEPER: [Signal; 5] = [
    Signal::SIGCHLD,
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGUSR2,
];

/// What a daemon is asked by a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// To end (SIGTERM, SIGINT).
    Leave,
    /// To make way for another daemon (SIGHUP).
    MakeWay,
}

/// The signals by which a daemon is asked to leave.
#[derive(Debug)]
pub(crate) struct Requests {
    terminate: Received,
    interrupt: Received,
    hangup: Received,
}

/// Lets those signals wait that ask a daemon to leave, and unblocks all others: a mask is inherited
/// and would reach every container. They come when a daemon [listens](Requests::listen).
pub(crate) fn hold_back_requests() -> nix::Result<()> {
    let mut held_back = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        held_back.add(signal);
    }
    held_back.thread_set_mask()
}

impl Requests {
    /// Listens from now on. Needs a tokio runtime, whose threads are to start afterwards.
    pub(crate) fn listen() -> io::Result<Self> {
        let requests = Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        };
        SigSet::empty().thread_set_mask()?;
        Ok(requests)
    }

    /// Completes at the next request.
    pub(crate) async fn next(&mut self) -> Request {
        tokio::select! {
            Some(()) = self.terminate.recv() => Request::Leave,
            Some(()) = self.interrupt.recv() => Request::Leave,
            Some(()) = self.hangup.recv() => Request::MakeWay,
            else => std::future::pending().await,
        }
    }
}

/// Whether this process was asked to end, seen also by what runs after its runtime: a process that
/// becomes another program by `execve` would forget a request that came to the one before.
#[derive(Debug)]
pub(crate) struct Ending {
    is_asked_for: Arc<AtomicBool>,
    is_immediate: Arc<AtomicBool>,
}

impl Ending {
    /// Notes each SIGTERM and SIGINT from now on.
    pub(crate) fn watch() -> io::Result<Self> {
        let ending = Self {
            is_asked_for: Arc::default(),
            is_immediate: Arc::default(),
        };
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            // In this order: what finds `is_immediate` unset was noted before it is looked at.
            flag::register(signal as i32, Arc::clone(&ending.is_asked_for))?;
            flag::register_conditional_default(signal as i32, Arc::clone(&ending.is_immediate))?;
        }
        Ok(ending)
    }

    /// Whether such a signal has come. If none has, the next one ends this process at once.
    pub(crate) fn is_due(&self) -> bool {
        self.is_immediate.store(true, Ordering::SeqCst);
        self.is_asked_for.load(Ordering::SeqCst)
    }
}

/// A descriptor to read a keeper's signals from, which are blocked from here on; all others are
/// unblocked.
pub(crate) fn open_for_keeper() -> nix::Result<SignalFd> {
    let mut wanted = SigSet::empty();
    for signal in OF_KEEPER {
        wanted.add(signal);
    }
    wanted.thread_set_mask()?;
    SignalFd::with_flags(&wanted, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

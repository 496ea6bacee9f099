//! The signals that daemon and keeper act on. Owns which ones they are, and that none that was
//! blocked before this process started stays blocked in a container.

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tokio::signal::unix::{SignalKind, signal};
use tracing::warn;

/// Those that a keeper reads: children that ended, and what an operator asks for.
const OF_KEEPER: [Signal; 5] = [
    Signal::SIGCHLD,
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGUSR2,
];

/// Unblocks all signals: a mask is inherited, and would reach every container.
pub(crate) fn unblock_all() -> nix::Result<()> {
    SigSet::empty().thread_set_mask()
}

/// Waits until the daemon is asked to leave, by SIGTERM, SIGINT or SIGHUP.
pub(crate) async fn leave_requested() {
    let (Ok(mut terminate), Ok(mut interrupt), Ok(mut hangup)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
        signal(SignalKind::hangup()),
    ) else {
        warn!("cannot listen for SIGTERM, SIGINT and SIGHUP");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = hangup.recv() => {}
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

//! [`FlowState`]: what a flow and its owner share, and [`FlowPath`], what it goes through. Moves
//! nothing and waits for nothing.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

use super::append::Label;
use super::open;
use super::pump::{Progress, Way};
use crate::clock::BootTime;
use crate::fdstore::{FdRole, ProcessFds};

/// The output of a terminal.
pub(super) const TERMINAL: &[FdRole] = &[FdRole::Terminal];

/// What a flow goes through, and when it is over.
#[derive(Clone, Debug)]
pub(super) struct FlowPath {
    pub(super) way: Way,
    /// When its process has ended: it is over if nothing comes for this long, though the source has
    /// other writers. `None`: it is over when they are gone.
    pub(super) patience: Option<Duration>,
    /// What becomes of the sink then.
    pub(super) at_end: AtEnd,
    pub(super) label: Label,
}

/// What becomes of a sink when nothing more comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AtEnd {
    /// It is closed.
    Close,
    /// It is closed, and what is unread of it is kept until the exit is published: see
    /// [`super::taken`].
    KeepUntilPublished,
    /// It is closed, and what is unread of it is kept for a client that comes back.
    KeepUnread,
    /// It stays open: it is another flow's too.
    Leave,
}

/// What a flow shares with its owner.
#[derive(Debug, Default)]
pub(super) struct FlowState {
    /// Its process has ended.
    is_last: AtomicBool,
    /// Its process's exit is published.
    is_published: AtomicBool,
    /// Everything is moved and the sink is closed, or it was given up.
    is_done: AtomicBool,
    pub(super) progress: Progress,
    /// Since when nothing was taken of what there is, in nanoseconds since boot; 0 if nothing
    /// waits.
    blocked_since: AtomicU64,
    /// Its process has ended, or its descriptors have changed. The flow alone waits for it.
    pub(super) changed: Notify,
    /// It is done, or its owner has dropped it.
    pub(super) done: Notify,
}

impl FlowState {
    pub(super) fn is_last(&self) -> bool {
        self.is_last.load(Ordering::Acquire)
    }

    pub(super) fn is_published(&self) -> bool {
        self.is_published.load(Ordering::SeqCst)
    }

    pub(super) fn is_done(&self) -> bool {
        self.is_done.load(Ordering::Acquire)
    }

    /// Bytes that have reached the sink.
    pub(super) fn moved(&self) -> u64 {
        self.progress.moved.load(Ordering::Acquire)
    }

    /// It begins to move what there is, which takes no time if the sink takes it.
    pub(super) fn pump_begins(&self) {
        self.blocked_since
            .store(BootTime::now().0, Ordering::Relaxed);
    }

    /// Nothing waits for the sink any more.
    pub(super) fn nothing_waits(&self) {
        self.blocked_since.store(0, Ordering::Relaxed);
    }

    /// Since when the sink has taken nothing of what there is.
    pub(super) fn blocked_since(&self) -> Option<BootTime> {
        let since = self.blocked_since.load(Ordering::Relaxed);
        (since != 0 && !self.is_done()).then_some(BootTime(since))
    }

    pub(super) fn process_ended(&self) {
        self.is_last.store(true, Ordering::Release);
    }

    pub(super) fn exit_is_published(&self) {
        self.is_published.store(true, Ordering::SeqCst);
    }

    /// Its owner has dropped it: nothing is moved from here on.
    pub(super) fn stop(&self) {
        self.progress.stop.store(true, Ordering::Release);
        self.changed.notify_one();
        self.done.notify_waiters();
    }

    /// The flow is over, or rests no more since its owner has dropped it.
    pub(super) fn end(&self) {
        self.is_done.store(true, Ordering::Release);
        self.done.notify_waiters();
    }
}

/// Closes what keeps the unread rest of an output.
pub(super) fn remove_unread(fds: &ProcessFds, way: Way) {
    if let Some(role) = way.sink
        && fds.get(role).is_some_and(|fd| open::is_reader(&fd))
    {
        fds.remove(&[role]);
    }
}

//! [`Flow`]: one direction of one stream, from its first byte to its end. Owns when bytes are moved
//! and what follows from the end; how they are moved is [`super::pump`]'s. An idle flow is one
//! small tokio task and holds no thread and no buffer.

use std::future::pending;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::poll::PollFlags;
use tokio::io::Interest;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tracing::{debug, warn};

use super::append::{Dropped, Label};
use super::open;
use super::pump::{Progress, Stopped, Way, pump};
use super::ready::is_ready;
use crate::fdstore::{FdRole, ProcessFds, StreamFd};
use crate::sys;

/// A terminal that no process has open is looked at again after this.
const HUNG_UP: Duration = Duration::from_millis(100);
/// The same for a stream that cannot be moved for a lack of descriptors, memory or threads.
const TROUBLE: Duration = Duration::from_millis(500);
/// The output of an exec that has ended, of which nothing is taken for this long, is given up if it
/// has no reader: nothing may ever delete the exec.
const UNREAD: Duration = Duration::from_mins(1);

/// The output of a terminal.
pub(super) const TERMINAL: &[FdRole] = &[FdRole::Terminal];

/// What a flow goes through, and when it is over.
#[derive(Clone, Debug)]
pub(super) struct Course {
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
    /// It is closed, and what is unread of it is kept until the exit is told: see [`super::taken`].
    KeepUntilTold,
    /// It is closed, and what is unread of it is kept for a client that comes back.
    KeepUnread,
    /// It stays open: it is another flow's too.
    Leave,
}

/// What a flow shares with its owner.
#[derive(Debug, Default)]
struct Shared {
    /// Its process has ended.
    is_last: AtomicBool,
    /// Its process's exit is told.
    is_told: AtomicBool,
    /// Everything is moved and the sink is closed, or it was given up.
    is_done: AtomicBool,
    progress: Progress,
    /// Its process has ended, or its descriptors have changed. The flow alone waits for it.
    changed: Notify,
    done: Notify,
}

impl Shared {
    fn is_last(&self) -> bool {
        self.is_last.load(Ordering::Acquire)
    }
}

/// What to do after a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Pump,
    /// Once more, and if nothing has come it is over.
    PumpLast,
    End,
}

/// One direction of one stream. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Flow {
    way: Way,
    at_end: AtEnd,
    shared: Arc<Shared>,
    task: AbortHandle,
}

impl Flow {
    /// Begins to move bytes. Needs a tokio runtime.
    pub(super) fn start(course: Course, fds: ProcessFds) -> Self {
        let (way, at_end) = (course.way, course.at_end);
        let shared = Arc::<Shared>::default();
        let run = Run {
            course,
            fds,
            shared: Arc::clone(&shared),
        };
        Self {
            way,
            at_end,
            shared,
            task: tokio::spawn(run.flow()).abort_handle(),
        }
    }

    /// Its process has ended.
    pub(super) fn process_ended(&self) {
        self.shared.is_last.store(true, Ordering::Release);
        self.kick();
    }

    /// Its process's exit is told: what its client has not read now, it may never read.
    pub(super) fn exit_is_told(&self, fds: &ProcessFds) {
        self.shared.is_told.store(true, Ordering::SeqCst);
        if self.at_end == AtEnd::KeepUntilTold {
            forget_unread(fds, self.way);
        }
    }

    /// Its descriptors have changed.
    pub(super) fn kick(&self) {
        self.shared.changed.notify_one();
    }

    /// Waits until everything is moved and the sink is closed.
    pub(super) async fn done(&self) {
        let done = self.shared.done.notified();
        if !self.shared.is_done.load(Ordering::Acquire) {
            done.await;
        }
    }

    /// What it goes through, and how much it has moved.
    pub(super) fn meter(&self) -> Meter {
        Meter {
            way: self.way,
            shared: Arc::clone(&self.shared),
        }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.shared.progress.stop.store(true, Ordering::Relaxed);
        self.task.abort();
    }
}

/// Closes what keeps the unread rest of an output.
fn forget_unread(fds: &ProcessFds, way: Way) {
    if let Some(role) = way.sink
        && fds.get(role).is_some_and(|fd| open::is_reader(&fd))
    {
        fds.forget(&[role]);
    }
}

/// How far a flow has come. It outlives the flow.
#[derive(Clone, Debug)]
pub(super) struct Meter {
    pub(super) way: Way,
    shared: Arc<Shared>,
}

impl Meter {
    /// Bytes that this daemon has moved to the sink.
    pub(super) fn moved(&self) -> u64 {
        self.shared.progress.moved.load(Ordering::Acquire)
    }
}

/// A flow under way.
struct Run {
    course: Course,
    fds: ProcessFds,
    shared: Arc<Shared>,
}

impl Drop for Run {
    fn drop(&mut self) {
        self.shared.is_done.store(true, Ordering::Release);
        self.shared.done.notify_waiters();
    }
}

impl Run {
    async fn flow(self) {
        // A terminal that we have open ourselves never hangs up: its program may close it and open
        // it again.
        let mut peer = self.peer();
        let mut dropped = Dropped::default();
        let mut stopped = Stopped::SourceEmpty;
        let mut is_in_trouble = false;
        loop {
            if self.shared.is_last() {
                peer = None;
            }
            let next = self.next(stopped).await;
            if next == Next::End {
                break;
            }
            match self.pump(&mut dropped).await {
                Ok((Stopped::End | Stopped::Asked, _)) => break,
                Ok((Stopped::SourceEmpty, false)) if next == Next::PumpLast => break,
                Ok((now, _)) => {
                    stopped = now;
                    is_in_trouble = false;
                }
                // The stream has not ended: its ends stay, and it goes on when that is over.
                Err(error) => {
                    let (id, stream) = (&self.course.label.id, self.course.label.stream);
                    if !is_in_trouble {
                        warn!(%id, stream, %error, "a stream cannot be moved; trying again");
                    }
                    is_in_trouble = true;
                    tokio::time::sleep(TROUBLE).await;
                }
            }
        }
        drop(peer);
        let finish = move || self.finish();
        if let Err(error) = tokio::task::spawn_blocking(finish).await {
            debug!(%error, "the ends of a stream are not closed");
        }
    }

    /// Waits until there is something to do.
    async fn next(&self, stopped: Stopped) -> Next {
        let is_last = self.shared.is_last();
        match stopped {
            Stopped::SourceEmpty => {
                if self.has_more_on_its_way() {
                    return Next::Pump;
                }
                let source = self.fds.first(self.course.way.source);
                let patience = self.course.patience.filter(|_| is_last);
                let Some((_, source)) = source else {
                    return Next::End;
                };
                self.wait(Ok(source), Interest::READABLE, patience).await
            }
            Stopped::SinkFull => {
                let Some(sink) = self.course.way.sink.and_then(|sink| self.fds.get(sink)) else {
                    return Next::End;
                };
                // An init's client may be a containerd that is down.
                let limit =
                    (is_last && self.course.at_end == AtEnd::KeepUntilTold).then_some(UNREAD);
                // A duplicate: of a terminal both flows may wait, and a descriptor can be waited
                // for once.
                match self.wait(sink.duplicate(), Interest::WRITABLE, limit).await {
                    Next::PumpLast => self.give_up_unless_read(&sink).await,
                    next => next,
                }
            }
            Stopped::HungUp if is_last => Next::End,
            Stopped::HungUp => {
                let _ = tokio::time::timeout(HUNG_UP, self.shared.changed.notified()).await;
                Next::Pump
            }
            Stopped::End | Stopped::Asked => Next::End,
        }
    }

    fn has_more_on_its_way(&self) -> bool {
        let stage = self.course.way.stage.and_then(|stage| self.fds.get(stage));
        stage.is_some_and(|stage| is_ready(&stage, PollFlags::POLLIN, 0))
    }

    async fn wait(
        &self,
        fd: io::Result<StreamFd>,
        interest: Interest,
        limit: Option<Duration>,
    ) -> Next {
        let expired = async {
            match limit {
                Some(limit) => tokio::time::sleep(limit).await,
                None => pending().await,
            }
        };
        let ready = async {
            let fd = sys::register_stream(fd?, interest)?;
            fd.ready(interest).await.map(drop)
        };
        tokio::select! {
            ready = ready => {
                if let Err(error) = ready {
                    warn!(id = %self.course.label.id, %error, "cannot wait for a stream; trying again");
                    tokio::time::sleep(TROUBLE).await;
                }
                Next::Pump
            }
            () = self.shared.changed.notified() => Next::Pump,
            () = expired => Next::PumpLast,
        }
    }

    /// A client that is slow is waited for. One that has gone leaves a fifo without a reader, once
    /// ours is not one any more.
    async fn give_up_unless_read(&self, sink: &StreamFd) -> Next {
        let (held, role) = (sink.clone(), self.course.way.sink);
        let fds = self.fds.clone();
        let look = move || -> io::Result<bool> {
            let Some(role) = role.filter(|_| open::is_held(&held)) else {
                return Ok(is_ready(&held, PollFlags::empty(), 0));
            };
            let writer = StreamFd::new(open::reopen(&held, libc::O_WRONLY | libc::O_NONBLOCK)?);
            drop(held);
            fds.exchange(Some((role, writer.clone())), &[role]);
            Ok(is_ready(&writer, PollFlags::empty(), 0))
        };
        match tokio::task::spawn_blocking(look).await {
            Ok(Ok(true)) => {
                let (id, stream) = (&self.course.label.id, self.course.label.stream);
                warn!(%id, stream, "the output of an exec that has ended has no reader: the rest of it is dropped");
                Next::End
            }
            _ => Next::Pump,
        }
    }

    async fn pump(&self, dropped: &mut Dropped) -> io::Result<(Stopped, bool)> {
        let (way, fds) = (self.course.way, self.fds.clone());
        let (shared, label) = (Arc::clone(&self.shared), self.course.label.clone());
        let mut own = std::mem::take(dropped);
        let work = move || {
            let pumped = pump(way, &fds, &mut own, &shared.progress, &label);
            (pumped, own)
        };
        let (pumped, own) = tokio::task::spawn_blocking(work)
            .await
            .map_err(io::Error::other)?;
        *dropped = own;
        pumped
    }

    /// The other side of a terminal, if its output is what flows.
    fn peer(&self) -> Option<OwnedFd> {
        let master = self.fds.get(FdRole::Terminal)?;
        let flags = rustix::pty::OpenptFlags::RDWR
            | rustix::pty::OpenptFlags::NOCTTY
            | rustix::pty::OpenptFlags::CLOEXEC;
        let wanted = self.course.way.source == TERMINAL;
        wanted.then(|| rustix::pty::ioctl_tiocgptpeer(&master, flags).ok())?
    }

    /// Closes both ends. What a client has not read is kept by a reader, which is no writer that
    /// would hide the end from it. Blocks.
    fn finish(&self) {
        let Course { way, at_end, .. } = self.course;
        let is_last = self.shared.is_last();
        let is_told = || self.shared.is_told.load(Ordering::SeqCst);
        let keeps_unread = match at_end {
            AtEnd::KeepUnread => true,
            AtEnd::KeepUntilTold => !is_told(),
            AtEnd::Close | AtEnd::Leave => false,
        };
        let mut forgotten: Vec<FdRole> = way.stage.into_iter().collect();
        // While its process lives, the input of a terminal may still flow, and closing the master
        // would be a hang-up.
        if way.source != TERMINAL || is_last {
            forgotten.extend(way.source);
        }
        let mut reader = None;
        if let Some(role) = way.sink.filter(|_| at_end != AtEnd::Leave) {
            reader = self
                .fds
                .get(role)
                .filter(|fd| keeps_unread && open::is_held(fd))
                .and_then(|fd| open::reopen(&fd, libc::O_RDONLY | libc::O_NONBLOCK).ok())
                .map(|reader| (role, StreamFd::new(reader)));
            forgotten.push(role);
        }
        self.fds.exchange(reader, &forgotten);
        if at_end == AtEnd::KeepUntilTold && is_told() {
            forget_unread(&self.fds, way);
        }
    }
}

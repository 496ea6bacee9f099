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
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::{debug, warn};

use super::append::{Dropped, Label};
use super::open;
use super::pump::{Stopped, Way, is_ready, pump};
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
    /// The same, but what is unread of it is kept for a client that comes back.
    KeepUnread,
    /// It stays open: it is another flow's too.
    Leave,
}

/// What a flow has to know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct News {
    /// Its process has ended.
    is_last: bool,
    /// Counts changes of its descriptors.
    kicks: u32,
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
    news: watch::Sender<News>,
    is_done: watch::Receiver<bool>,
    stop: Arc<AtomicBool>,
    task: AbortHandle,
}

impl Flow {
    /// Begins to move bytes. Needs a tokio runtime.
    pub(super) fn start(course: Course, fds: ProcessFds) -> Self {
        let (news, heard) = watch::channel(News::default());
        let (done, is_done) = watch::channel(false);
        let stop = Arc::new(AtomicBool::new(false));
        let run = Run {
            course,
            fds,
            news: heard,
            stop: Arc::clone(&stop),
        };
        let task = tokio::spawn(async move {
            run.flow().await;
            done.send_replace(true);
        });
        Self {
            news,
            is_done,
            stop,
            task: task.abort_handle(),
        }
    }

    /// Its process has ended.
    pub(super) fn process_ended(&self) {
        self.news.send_modify(|news| news.is_last = true);
    }

    /// Its descriptors have changed.
    pub(super) fn kick(&self) {
        self.news.send_modify(|news| news.kicks += 1);
    }

    /// Waits until everything is moved and the sink is closed.
    pub(super) async fn done(&self) {
        let mut is_done = self.is_done.clone();
        let _ = is_done.wait_for(|done| *done).await;
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.abort();
    }
}

/// A flow under way.
struct Run {
    course: Course,
    fds: ProcessFds,
    news: watch::Receiver<News>,
    stop: Arc<AtomicBool>,
}

impl Run {
    async fn flow(mut self) {
        // A terminal that we have open ourselves never hangs up: its program may close it and open
        // it again.
        let mut peer = self.peer();
        let mut dropped = Dropped::default();
        let mut stopped = Stopped::SourceEmpty;
        let mut is_in_trouble = false;
        loop {
            if self.news.borrow().is_last {
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
    async fn next(&mut self, stopped: Stopped) -> Next {
        let is_last = self.news.borrow_and_update().is_last;
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
                let limit = (is_last && self.course.at_end == AtEnd::Close).then_some(UNREAD);
                // A duplicate: of a terminal both flows may wait, and a descriptor can be waited
                // for once.
                match self.wait(sink.duplicate(), Interest::WRITABLE, limit).await {
                    Next::PumpLast => self.give_up_unless_read(&sink).await,
                    next => next,
                }
            }
            Stopped::HungUp if is_last => Next::End,
            Stopped::HungUp => {
                let _ = tokio::time::timeout(HUNG_UP, self.news.changed()).await;
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
        &mut self,
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
            changed = self.news.changed() => match changed {
                Ok(()) => Next::Pump,
                Err(_given_up) => Next::End,
            },
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
        let (stop, label) = (Arc::clone(&self.stop), self.course.label.clone());
        let mut own = std::mem::take(dropped);
        let work = move || {
            let pumped = pump(way, &fds, &mut own, &stop, &label);
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
        let mut forgotten: Vec<FdRole> = way.stage.into_iter().collect();
        // While its process lives, the input of a terminal may still flow, and closing the master
        // would be a hang-up.
        if way.source != TERMINAL || self.news.borrow().is_last {
            forgotten.extend(way.source);
        }
        let mut reader = None;
        if let Some(role) = way.sink.filter(|_| at_end != AtEnd::Leave) {
            reader = self
                .fds
                .get(role)
                .filter(|fd| at_end == AtEnd::KeepUnread && open::is_held(fd))
                .and_then(|fd| open::reopen(&fd, libc::O_RDONLY | libc::O_NONBLOCK).ok())
                .map(|reader| (role, StreamFd::new(reader)));
            forgotten.push(role);
        }
        self.fds.exchange(reader, &forgotten);
    }
}

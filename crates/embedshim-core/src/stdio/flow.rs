//! [`Flow`]: one direction of one stream, from its first byte to its end. Owns when bytes are moved and what follows from the end;
//! how they are moved is [`super::pump`]'s. An idle flow is one small tokio task and holds no thread and no buffer.

use std::future::pending;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::Interest;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::{debug, warn};

use super::open;
use super::pump::{Dropped, Label, Sink, Stopped, pump};
use crate::fdstore::{FdRole, ProcessFds};
use crate::sys;

/// A terminal that no process has open is looked at again after this.
const HUNG_UP: Duration = Duration::from_millis(100);
/// The output of an exec that has ended is given up when its client takes nothing of it for this long: nothing may ever delete it.
const UNREAD: Duration = Duration::from_mins(1);

/// What a flow is between, and when it is over.
#[derive(Clone, Debug)]
pub(super) struct Course {
    pub(super) source: FdRole,
    /// Nothing: what comes is dropped.
    pub(super) sink: Option<FdRole>,
    /// When its process has ended: it is over if nothing comes for this long, though the source has other writers. `None`: it is over
    /// when they are gone.
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
    /// Its process has ended, or what is before it in a chain.
    is_last: bool,
    /// Counts changes of its descriptors.
    kicks: u32,
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

    /// What comes from another flow is over with that one. Needs a tokio runtime.
    pub(super) fn end_after(&self, first: &Self) {
        let (mut is_done, news) = (first.is_done.clone(), self.news.clone());
        tokio::spawn(async move {
            // An error says that the streams are given up.
            if is_done.wait_for(|done| *done).await.is_ok() {
                news.send_modify(|news| news.is_last = true);
            }
        });
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
        // A terminal that we have open ourselves never hangs up: its program may close it and open it again.
        let mut peer = self.peer();
        let mut dropped = Dropped::default();
        let mut stopped = Stopped::SourceEmpty;
        loop {
            if self.news.borrow().is_last {
                peer = None;
            }
            if !self.has_more(stopped).await {
                break;
            }
            match self.pump(&mut dropped).await {
                Ok(Stopped::End | Stopped::Asked) => break,
                Ok(next) => stopped = next,
                Err(error) => {
                    let (id, stream) = (&self.course.label.id, self.course.label.stream);
                    warn!(%id, stream, %error, "a stream cannot be moved any more");
                    break;
                }
            }
        }
        drop(peer);
        self.finish();
    }

    /// Waits until there is something to do; false if there never will be.
    async fn has_more(&mut self, stopped: Stopped) -> bool {
        let is_last = self.news.borrow_and_update().is_last;
        let course = &self.course;
        let (fd, interest, limit) = match stopped {
            Stopped::SourceEmpty => (
                self.fds.get(course.source),
                Interest::READABLE,
                course.patience.filter(|_| is_last),
            ),
            Stopped::SinkFull => (
                // A duplicate: of a terminal both flows may wait, and a descriptor can be waited for once.
                course
                    .sink
                    .and_then(|sink| self.fds.get(sink)?.try_clone().ok())
                    .map(Arc::new),
                Interest::WRITABLE,
                // An init's client may be a containerd that is down.
                (is_last && course.at_end == AtEnd::Close).then_some(UNREAD),
            ),
            Stopped::HungUp if is_last => return false,
            Stopped::HungUp => {
                let _ = tokio::time::timeout(HUNG_UP, self.news.changed()).await;
                return true;
            }
            Stopped::End | Stopped::Asked => return false,
        };
        let Some(fd) = fd else { return false };
        let expired = async {
            match limit {
                Some(limit) => tokio::time::sleep(limit).await,
                None => pending().await,
            }
        };
        tokio::select! {
            ready = ready(fd, interest) => {
                if let Err(error) = &ready {
                    debug!(id = %self.course.label.id, %error, "cannot wait for a stream");
                }
                ready.is_ok()
            }
            changed = self.news.changed() => changed.is_ok(),
            () = expired => {
                if stopped == Stopped::SinkFull {
                    let (id, stream) = (&self.course.label.id, self.course.label.stream);
                    warn!(%id, stream, "the output of an exec that has ended is not read: the rest of it is dropped");
                }
                false
            }
        }
    }

    async fn pump(&self, dropped: &mut Dropped) -> io::Result<Stopped> {
        let Some(source) = self.fds.get(self.course.source) else {
            return Ok(Stopped::End);
        };
        let sink = match self.course.sink {
            None => None,
            Some(role) => match self.fds.get(role) {
                Some(fd) => Some(fd),
                None => return Ok(Stopped::End),
            },
        };
        let (stop, label) = (Arc::clone(&self.stop), self.course.label.clone());
        let mut own = std::mem::take(dropped);
        let work = move || {
            let to = match &sink {
                None => Sink::Null,
                Some(fd) if is_file(fd) => Sink::File(fd, &mut own),
                Some(fd) => Sink::Stream(fd.as_fd()),
            };
            let stopped = pump(source.as_fd(), to, &stop, &label);
            (stopped, own)
        };
        let (stopped, own) = tokio::task::spawn_blocking(work)
            .await
            .map_err(io::Error::other)?;
        *dropped = own;
        stopped
    }

    /// The other side of a terminal, if its output is what flows.
    fn peer(&self) -> Option<OwnedFd> {
        let master = self.fds.get(FdRole::Terminal)?;
        let flags = rustix::pty::OpenptFlags::RDWR
            | rustix::pty::OpenptFlags::NOCTTY
            | rustix::pty::OpenptFlags::CLOEXEC;
        let wanted = self.course.source == FdRole::Terminal;
        wanted.then(|| rustix::pty::ioctl_tiocgptpeer(&*master, flags).ok())?
    }

    /// Closes both ends. What a client has not read is kept by a reader, which is no writer that would hide the end from it.
    fn finish(&self) {
        let Course {
            source,
            sink,
            at_end,
            ..
        } = self.course;
        let mut forgotten: Vec<FdRole> = Vec::new();
        // While its process lives, the input of a terminal may still flow, and closing the master would be a hang-up.
        if source != FdRole::Terminal || self.news.borrow().is_last {
            forgotten.push(source);
        }
        let mut reader = None;
        if let Some(role) = sink.filter(|_| at_end != AtEnd::Leave) {
            reader = self
                .fds
                .get(role)
                .filter(|fd| at_end == AtEnd::KeepUnread && open::is_held(fd))
                .and_then(|fd| open::reopen(&*fd, libc::O_RDONLY | libc::O_NONBLOCK).ok())
                .map(|reader| (role, Arc::new(reader)));
            forgotten.push(role);
        }
        self.fds.exchange(reader, &forgotten);
    }
}

fn is_file(fd: &OwnedFd) -> bool {
    rustix::fs::fstat(fd).is_ok_and(|stat| {
        rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile
    })
}

async fn ready(fd: Arc<OwnedFd>, interest: Interest) -> io::Result<()> {
    let fd = sys::register(fd, interest)?;
    fd.ready(interest).await.map(drop)
}

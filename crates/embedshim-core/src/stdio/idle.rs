//! [`Idle`]: the streams in which nothing flows. Owns that one of them is no task, no thread and no
//! buffer: all of a node share one epoll instance, and one that has something to move becomes a
//! task again.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tracing::error;

use crate::fdstore::StreamFd;
use crate::sys;

/// What is taken from the kernel at once.
const EVENTS: usize = 64;

/// A stream that can rest.
pub(super) trait Resume: Send {
    /// Goes on, as a task, until it rests again or is over.
    fn resume(self: Box<Self>) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// The idle streams of a node. Clones are of the same.
#[derive(Clone)]
pub(crate) struct Idle(Arc<Inner>);

struct Inner {
    runtime: Handle,
    epoll: AsyncFd<Arc<OwnedFd>>,
    set: Epoll,
    resting: Mutex<HashMap<u64, Resting>>,
    last: AtomicU64,
}

/// One of them, and the source that it waits for, which stays open for that.
struct Resting {
    source: StreamFd,
    run: Box<dyn Resume>,
}

impl fmt::Debug for Idle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Idle")
            .field("resting", &self.resting().len())
            .finish_non_exhaustive()
    }
}

impl Idle {
    /// There is none yet. Needs a tokio runtime, on which they become tasks.
    pub(crate) fn new() -> io::Result<Self> {
        let set = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let epoll = sys::register(Arc::new(set.0.try_clone()?), Interest::READABLE)?;
        Ok(Self(Arc::new(Inner {
            runtime: Handle::current(),
            epoll,
            set,
            resting: Mutex::default(),
            last: AtomicU64::new(0),
        })))
    }

    /// A number that no other stream of the node has.
    pub(super) fn number(&self) -> u64 {
        self.0.last.fetch_add(1, Ordering::Relaxed)
    }

    /// Lets a stream rest until its source has something, or an end. It comes back with the error
    /// if that cannot be waited for.
    pub(super) fn rest<R: Resume + 'static>(
        &self,
        number: u64,
        source: StreamFd,
        run: Box<R>,
    ) -> Result<(), (io::Error, Box<R>)> {
        let mut resting = self.resting();
        // Once: the first that is woken takes it out.
        let what = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLONESHOT;
        if let Err(errno) = self.0.set.add(&source, EpollEvent::new(what, number)) {
            return Err((errno.into(), run));
        }
        resting.insert(number, Resting { source, run });
        Ok(())
    }

    /// Takes a stream back, if it rests.
    pub(super) fn take(&self, number: u64) -> Option<Box<dyn Resume>> {
        let Resting { source, run } = self.resting().remove(&number)?;
        // It fails for one that is not in the set, which is what is wanted.
        let _ = self.0.set.delete(&source);
        Some(run)
    }

    /// Makes a task of a stream.
    pub(super) fn wake(&self, run: Box<dyn Resume>) {
        drop(self.0.runtime.spawn(run.resume()));
    }

    /// Wakes each stream that has something to move, as long as this is polled. One at a time may
    /// do it.
    pub(crate) async fn serve(self) {
        loop {
            let Ok(mut ready) = self.0.epoll.readable().await else {
                return;
            };
            let mut events = [EpollEvent::empty(); EVENTS];
            match self.0.set.wait(&mut events, EpollTimeout::ZERO) {
                Ok(0) => ready.clear_ready(),
                Ok(count) => {
                    let numbers = events.iter().take(count).map(EpollEvent::data);
                    let runs = numbers.filter_map(|number| self.take(number));
                    runs.for_each(|run| self.wake(run));
                    // Other tasks want the reactor as well.
                    tokio::task::yield_now().await;
                }
                Err(Errno::EINTR) => {}
                Err(error) => {
                    error!(%error, "cannot poll idle streams: they do not flow until this daemon is replaced");
                    return;
                }
            }
        }
    }

    fn resting(&self) -> MutexGuard<'_, HashMap<u64, Resting>> {
        self.0
            .resting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

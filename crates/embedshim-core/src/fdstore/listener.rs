//! [`Listener`]: a listening socket whose connections can be stored in the step that accepts them.
//! Owns the waiting and the accepting; where a connection is stored is its caller's.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::net::{SocketFlags, accept_with};
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};

use super::intake::Intake;
use crate::sys;

/// A listening socket, which is non-blocking.
#[derive(Debug)]
pub struct Listener(AsyncFd<Arc<OwnedFd>>);

impl Listener {
    /// Makes the socket non-blocking. Needs a tokio runtime.
    pub fn new(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        sys::register(Arc::new(listener.into()), Interest::READABLE).map(Self)
    }

    /// Waits until a connection may be there. Can be cancelled.
    pub async fn readable(&self) -> io::Result<Waiting<'_>> {
        self.0.readable().await.map(Waiting)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

/// A connection that may be there.
#[derive(Debug)]
pub struct Waiting<'a>(AsyncFdReadyGuard<'a, Arc<OwnedFd>>);

impl Waiting<'_> {
    /// Accepts it into the queue, with this number ([`Intake::first`]). Returns it if it is there
    /// and is not in the queue. Not to be cancelled.
    pub async fn accept_into(self, intake: &Intake, number: u64) -> io::Result<Option<OwnedFd>> {
        let sender = intake.sender();
        let accepted = self.accept(move |listener| Intake::accept(&sender, number, listener));
        Ok(accepted.await?.flatten())
    }

    /// Accepts it by this function, away from the reactor; `None` if there is none. Not to be
    /// cancelled: what the function has accepted would be lost.
    pub async fn accept<T: Send + 'static>(
        mut self,
        accept: impl FnOnce(BorrowedFd<'_>) -> io::Result<T> + Send + 'static,
    ) -> io::Result<Option<T>> {
        // After each connection it is asked whether there is another, which is seldom so. The
        // thread and the process that accept cost a hundred times as much as the question.
        if !is_waiting(self.0.get_inner().as_fd())? {
            // What has come since is not missed: it makes the socket ready again.
            self.0.clear_ready();
            return Ok(None);
        }
        let listener = Arc::clone(self.0.get_inner());
        let accepted = tokio::task::spawn_blocking(move || accept(listener.as_fd())).await;
        match accepted.map_err(io::Error::other)? {
            Ok(accepted) => Ok(Some(accepted)),
            // Its client has left meanwhile.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.0.clear_ready();
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// Whether a connection is there to be accepted.
fn is_waiting(listener: BorrowedFd<'_>) -> io::Result<bool> {
    let mut polled = [PollFd::new(listener, PollFlags::POLLIN)];
    match poll(&mut polled, PollTimeout::ZERO) {
        Err(Errno::EINTR) => Ok(true),
        ready => Ok(ready? != 0),
    }
}

/// accept(2). The connection is non-blocking.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::io::retry_on_intr(|| accept_with(listener, flags))?)
}

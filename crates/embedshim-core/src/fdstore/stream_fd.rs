//! [`StreamFd`]: a descriptor whose closing may wait. Owns that it never waits on the reactor.
//!
//! Closing the last descriptor of a pipe takes the pipe's lock, uninterruptibly, and a container
//! can hold that for as long as it likes: by `splice(2)` from a socket that is silent, or by
//! writing from a page that a hung file system has to fill. Closing a file on FUSE or NFS waits for
//! the server.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

/// An end of a stream, closed in a thread of its own when the last clone is dropped.
#[derive(Clone, Debug)]
pub(crate) struct StreamFd(Arc<Closing>);

#[derive(Debug)]
struct Closing {
    fd: Option<OwnedFd>,
    number: RawFd,
}

impl StreamFd {
    pub(crate) fn new(fd: impl Into<OwnedFd>) -> Self {
        let fd = fd.into();
        let number = fd.as_raw_fd();
        Self(Arc::new(Closing {
            fd: Some(fd),
            number,
        }))
    }

    /// Another descriptor of the same file: a descriptor can be waited for once.
    pub(crate) fn duplicate(&self) -> io::Result<Self> {
        self.as_fd().try_clone_to_owned().map(Self::new)
    }
}

impl AsFd for StreamFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0.fd {
            Some(fd) => fd.as_fd(),
            // It is taken by `drop` alone, after which there is no `self`.
            None => unreachable!("descriptor {} is closed", self.0.number),
        }
    }
}

impl AsRawFd for StreamFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.number
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        off_the_reactor(self.fd.take());
    }
}

/// Drops something in a thread of its own, if there is a reactor that must not wait for it.
pub(crate) fn off_the_reactor<T: Send + 'static>(dropped: T) {
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => drop(runtime.spawn_blocking(move || drop(dropped))),
        Err(_) => drop(dropped),
    }
}

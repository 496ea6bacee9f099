//! [`Intake`]: where a connection is from the instant it is accepted until it is stored under a
//! name of its own. Owns the queue and the accepting into it; what is done with a connection is its
//! reader's.
//!
//! The store cannot take a connection at that instant: it learns a descriptor's name from this
//! process, which may be dead by then. The queue is a socket pair that the store holds, so what a
//! process has sent into it is there for its successor.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::warn;

use super::peek::peek;
use super::sys::{Source, obtain_and_send};
use super::{FdName, FdStore, InheritedFds};
use crate::sys;

/// The digits of any number.
const MAX_TEXT: usize = 20;

/// Connections that were accepted and have no name of their own in the store yet, in order, each
/// with the number that it is to have.
#[derive(Debug)]
pub struct Intake {
    receiver: AsyncFd<Arc<OwnedFd>>,
    sender: Arc<OwnedFd>,
}

impl Intake {
    /// The one that a predecessor has left, with what is in it, or a new one, which is stored.
    /// Needs a tokio runtime.
    pub fn open(inherited: &mut InheritedFds, store: &dyn FdStore) -> io::Result<Self> {
        let ends = (
            inherited.take(&FdName::Intake),
            inherited.take(&FdName::IntakeSender),
        );
        if let (Some(receiver), Some(sender)) = ends {
            return Self::of(receiver, sender);
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (sender, receiver) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let names = [FdName::Intake, FdName::IntakeSender];
        let stored = names
            .iter()
            .zip([&receiver, &sender])
            .try_for_each(|(name, end)| {
                store.remove(name)?;
                store.add(name, &[end.as_fd()])
            });
        if let Err(error) = stored {
            warn!(%error, "cannot store the queue of accepted connections: one that this daemon accepts right before it is killed is lost");
        }
        Self::of(receiver, sender)
    }

    fn of(receiver: OwnedFd, sender: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            receiver: sys::register(Arc::new(receiver), Interest::READABLE)?,
            sender: Arc::new(sender),
        })
    }

    /// Accepts a connection of a non-blocking listener into the queue, in a process of its own: a
    /// SIGKILL for this one does not come between the two. Returns the connection if it is not in
    /// the queue. The error is that of accepting: `WouldBlock` if no connection waits. Blocks until
    /// that process has ended, some 0.1 ms.
    pub(super) fn accept(
        sender: &OwnedFd,
        number: u64,
        listener: BorrowedFd<'_>,
    ) -> io::Result<Option<OwnedFd>> {
        let text = number.to_string();
        let source = Source::Listener(listener);
        let obtained = obtain_and_send(source, sender.as_fd(), text.as_bytes(), &[])?;
        Ok(match obtained.sent {
            Ok(()) => None,
            Err(error) => {
                warn!(connection = number, %error, "cannot queue an accepted connection");
                Some(obtained.descriptor)
            }
        })
    }

    pub(super) fn sender(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.sender)
    }

    /// Waits until a connection is there. Can be cancelled.
    pub async fn readable(&self) -> io::Result<()> {
        self.receiver.readable().await?.retain_ready();
        Ok(())
    }

    /// The first connection and its number, also if the reactor has not noticed it yet. It stays in
    /// the queue.
    pub fn first(&self) -> io::Result<Option<(u64, OwnedFd)>> {
        loop {
            let peeked = match first_of(self.receiver.get_ref()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // Asked again, so that the reactor learns that it is empty.
                    self.receiver
                        .try_io(Interest::READABLE, |receiver| first_of(receiver))
                }
                peeked => peeked,
            };
            match peeked {
                Ok(Some(first)) => return Ok(Some(first)),
                // Of another version.
                Ok(None) => self.drop_first(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Removes the first connection, which has a name of its own now.
    pub fn drop_first(&self) {
        // Without room for control messages the kernel closes what is in it.
        let socket = self.receiver.get_ref().as_raw_fd();
        let _ = recv(socket, &mut [0; MAX_TEXT], MsgFlags::MSG_DONTWAIT);
    }
}

fn first_of(receiver: &OwnedFd) -> io::Result<Option<(u64, OwnedFd)>> {
    let mut text = [0; MAX_TEXT];
    let (length, descriptors) = peek(receiver.as_fd(), &mut text)?;
    let number = text
        .get(..length)
        .and_then(|text| str::from_utf8(text).ok())
        .and_then(|text| text.parse().ok());
    Ok(number.zip(descriptors.into_iter().next()))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::super::{Listener, NoFdStore};
    use super::*;

    #[tokio::test]
    async fn a_connection_stays_in_the_queue_until_it_is_dropped_from_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::new(UnixListener::bind(&path).unwrap()).unwrap();
        let intake = Intake::open(&mut InheritedFds::default(), &NoFdStore).unwrap();
        assert!(intake.first().unwrap().is_none());
        let mut client = UnixStream::connect(&path).unwrap();
        let waiting = listener.readable().await.unwrap();
        assert!(waiting.accept_into(&intake, 7).await.unwrap().is_none());
        for _ in 0..2 {
            assert_eq!(intake.first().unwrap().unwrap().0, 7);
        }
        intake.readable().await.unwrap();
        client.set_nonblocking(true).unwrap();
        let open = client.read(&mut [0]).unwrap_err();
        assert_eq!(open.kind(), io::ErrorKind::WouldBlock);
        intake.drop_first();
        assert!(intake.first().unwrap().is_none());
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
    }
}

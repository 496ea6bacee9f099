//! [`Outgoing`]: the queue of datagrams to the service manager. Sends in order and never waits for
//! the manager to read. Its socket takes few datagrams (`net.unix.max_dgram_qlen`), and it may be
//! stopped: the rest is queued here, each with its descriptors, until it reads again.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tracing::{info, warn};

use super::message::Message;

/// The most descriptors of one datagram: a pair of sockets, and some room.
const MAX_FDS: usize = 4;
/// How long to wait for the socket before it is tried again, in milliseconds: it does not say that
/// the manager has ended.
const RETRY_PERIOD: u16 = 1000;
/// A manager that has taken nothing for so long is stopped, and not waited for.
const STOPPED: Duration = Duration::from_millis(500);

/// The socket and the queue; clones share them.
#[derive(Clone, Debug)]
pub(super) struct Outgoing(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    socket: OwnedFd,
    queue: Mutex<VecDeque<Datagram>>,
    /// When the manager has taken something last, since the queue was empty.
    taken: Mutex<Instant>,
    has_ended: AtomicBool,
}

#[derive(Debug)]
struct Datagram {
    text: String,
    descriptors: Vec<OwnedFd>,
}

impl Outgoing {
    /// An empty queue. `socket` is connected and non-blocking.
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self(Arc::new(Inner {
            socket,
            queue: Mutex::default(),
            taken: Mutex::new(Instant::now()),
            has_ended: AtomicBool::new(false),
        }))
    }

    /// Whether the manager gets all that was sent, also if this process dies now. True as well if
    /// it does not read.
    pub(super) fn is_settled(&self) -> bool {
        let taken = *lock(&self.0.taken);
        self.0.queue().is_empty() || taken.elapsed() > STOPPED
    }

    /// Sends a datagram, now or when the manager reads again. An error means that it is never sent.
    pub(super) fn send(&self, text: String, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let inner = &self.0;
        let mut queue = inner.queue();
        let is_first = queue.is_empty();
        if is_first {
            match inner.send_now(&text, descriptors) {
                Err(Errno::AGAIN) => {}
                sent => return Ok(sent?),
            }
        }
        if let Some(name) = removed_name(&text)
            && drop_unsent(&mut queue, name)
        {
            return Ok(());
        }
        let descriptors = descriptors.iter().map(BorrowedFd::try_clone_to_owned);
        queue.push_back(Datagram {
            text,
            descriptors: descriptors.collect::<io::Result<_>>()?,
        });
        if is_first {
            inner.note_taken();
            warn!(
                "the service manager does not read its socket: is it stopped? datagrams are queued"
            );
            let this = self.clone();
            let spawned = std::thread::Builder::new()
                .name("notify".into())
                .spawn(move || this.0.send_queued());
            if let Err(error) = spawned {
                queue.clear();
                return Err(error);
            }
        }
        Ok(())
    }
}

/// The name that this datagram removes, if it is one that is used once only.
fn removed_name(text: &str) -> Option<&str> {
    match Message::parse(text.as_bytes())? {
        Message::Remove(name) if name.contains('/') => Some(name),
        _ => None,
    }
}

/// Drops queued datagrams that store something under this name. True if there were any: then the
/// manager has nothing under it, and there is nothing to remove.
fn drop_unsent(queue: &mut VecDeque<Datagram>, name: &str) -> bool {
    let before = queue.len();
    queue.retain(|datagram| Message::parse(datagram.text.as_bytes()) != Some(Message::Store(name)));
    queue.len() < before
}

impl Inner {
    fn send_now(&self, text: &str, descriptors: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors))
        {
            return Err(Errno::INVAL);
        }
        let bytes = [IoSlice::new(text.as_bytes())];
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent =
            rustix::io::retry_on_intr(|| sendmsg(&self.socket, &bytes, &mut ancillary, flags));
        // The kernel says once that the peer has ended, and from then on that there is none.
        if !matches!(sent, Err(Errno::CONNREFUSED | Errno::NOTCONN)) {
            return sent.map(drop);
        }
        // Containers that run go on, and new ones are as safe as those: so this is no failure.
        if !self.has_ended.swap(true, Ordering::Relaxed) {
            warn!("the service manager has ended: notifications and descriptors are dropped");
        }
        Ok(())
    }

    /// Sends what is queued, in order. Returns when the queue is empty.
    fn send_queued(&self) {
        loop {
            let mut polled = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
            let _ = poll(&mut polled, PollTimeout::from(RETRY_PERIOD));
            let mut queue = self.queue();
            while let Some(first) = queue.front() {
                let fds: Vec<BorrowedFd<'_>> = first.descriptors.iter().map(AsFd::as_fd).collect();
                match self.send_now(&first.text, &fds) {
                    Err(Errno::AGAIN) => break,
                    Err(errno) => {
                        let datagram = first.text.trim_end();
                        let error = io::Error::from(errno);
                        warn!(datagram, %error, "cannot send to the service manager");
                    }
                    Ok(()) => {}
                }
                queue.pop_front();
                self.note_taken();
            }
            if queue.is_empty() {
                info!("the service manager reads again: all queued datagrams are sent");
                return;
            }
        }
    }

    fn note_taken(&self) {
        *lock(&self.taken) = Instant::now();
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Datagram>> {
        lock(&self.queue)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn what_a_stopped_manager_does_not_take_is_sent_later_in_order() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let outgoing = Outgoing::new(ours.into());
        // More datagrams than the queue of any socket takes.
        let texts: Vec<String> = (0..2000)
            .map(|number| format!("STATUS={number}\n"))
            .collect();
        let pipe = io::pipe().unwrap();
        for text in &texts {
            outgoing.send(text.clone(), &[pipe.0.as_fd()]).unwrap();
        }
        // What is stored and removed while it is stopped is not sent at all.
        outgoing
            .send(
                "FDSTORE=1\nFDNAME=p/1\nFDPOLL=0\n".into(),
                &[pipe.0.as_fd()],
            )
            .unwrap();
        outgoing
            .send("FDSTOREREMOVE=1\nFDNAME=p/1\n".into(), &[])
            .unwrap();
        outgoing.send("READY=1\n".into(), &[]).unwrap();
        assert!(!outgoing.is_settled());
        std::thread::sleep(STOPPED);
        assert!(outgoing.is_settled(), "a stopped manager is not waited for");
        let mut buffer = [0; 64];
        for text in texts.iter().map(String::as_str).chain(["READY=1\n"]) {
            let length = theirs.recv(&mut buffer).unwrap();
            assert_eq!(buffer.get(..length).unwrap(), text.as_bytes());
        }
    }
}

//! [`Outgoing`]: datagrams to the service manager, in order, without ever waiting for it. Owns
//! those that it does not take yet, since its queue is short (`net.unix.max_dgram_qlen`) and it may
//! be stopped: they are sent as soon as it reads again, each with its descriptors.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tracing::{info, warn};

/// A pair of sockets is the most that is sent at once.
const MAX_FDS: usize = 4;
/// A manager that has gone is noticed after this.
const LOOK_AGAIN: u16 = 1000;

/// What is sent, and what is still to be.
#[derive(Clone, Debug)]
pub(super) struct Outgoing(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    socket: OwnedFd,
    waiting: Mutex<VecDeque<Datagram>>,
    is_lost: AtomicBool,
}

#[derive(Debug)]
struct Datagram {
    text: String,
    descriptors: Vec<OwnedFd>,
}

impl Outgoing {
    /// `socket` is connected and non-blocking.
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self(Arc::new(Inner {
            socket,
            waiting: Mutex::default(),
            is_lost: AtomicBool::new(false),
        }))
    }

    /// Sends one, now or when the manager takes it. An error says that it never will.
    pub(super) fn send(&self, text: String, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let inner = &self.0;
        let mut waiting = inner.waiting();
        let is_first = waiting.is_empty();
        if is_first {
            match inner.send_now(&text, descriptors) {
                Err(Errno::AGAIN) => {}
                sent => return Ok(sent?),
            }
        }
        if let Some(name) = removed(&text)
            && drop_unsent(&mut waiting, name)
        {
            return Ok(());
        }
        let descriptors = descriptors.iter().map(BorrowedFd::try_clone_to_owned);
        waiting.push_back(Datagram {
            text,
            descriptors: descriptors.collect::<io::Result<_>>()?,
        });
        if is_first {
            warn!("service manager does not read its socket; is it stopped? datagrams wait");
            let this = self.clone();
            let spawned = std::thread::Builder::new()
                .name("notify".into())
                .spawn(move || this.0.send_waiting());
            if let Err(error) = spawned {
                waiting.clear();
                return Err(error);
            }
        }
        Ok(())
    }
}

/// The name that this datagram removes, if it is one that is used once.
fn removed(text: &str) -> Option<&str> {
    let name = text.strip_prefix("FDSTOREREMOVE=1\nFDNAME=")?;
    name.contains('/').then_some(name)
}

/// The name that it adds to.
fn added(text: &str) -> Option<&str> {
    let rest = text.strip_prefix("FDSTORE=1\nFDNAME=")?;
    rest.strip_suffix("FDPOLL=0\n")
}

/// Drops what waits to be stored under this name. True if the manager has never heard of it, so
/// that nothing is to be removed.
fn drop_unsent(waiting: &mut VecDeque<Datagram>, name: &str) -> bool {
    let before = waiting.len();
    waiting.retain(|datagram| added(&datagram.text) != Some(name));
    waiting.len() < before
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
        // Refused once, and not connected from then on.
        if !matches!(sent, Err(Errno::CONNREFUSED | Errno::NOTCONN)) {
            return sent.map(drop);
        }
        // What runs has to go on, and what is new is as safe as what runs.
        if !self.is_lost.swap(true, Ordering::Relaxed) {
            warn!("service manager has ended: nothing is sent to it any more");
        }
        Ok(())
    }

    /// Sends what waits, in order. Returns when nothing does.
    fn send_waiting(&self) {
        loop {
            let mut polled = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
            let _ = poll(&mut polled, PollTimeout::from(LOOK_AGAIN));
            let mut waiting = self.waiting();
            while let Some(first) = waiting.front() {
                let fds: Vec<BorrowedFd<'_>> = first.descriptors.iter().map(AsFd::as_fd).collect();
                match self.send_now(&first.text, &fds) {
                    Err(Errno::AGAIN) => break,
                    Err(errno) => {
                        let datagram = first.text.trim_end();
                        warn!(datagram, error = %io::Error::from(errno), "cannot send to the service manager");
                    }
                    Ok(()) => {}
                }
                waiting.pop_front();
            }
            if waiting.is_empty() {
                info!("service manager reads again; everything is sent");
                return;
            }
        }
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Datagram>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_a_stopped_manager_does_not_take_is_sent_later_in_order() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let outgoing = Outgoing::new(ours.into());
        // More than any queue or buffer takes.
        let texts: Vec<String> = (0..2000)
            .map(|number| format!("STATUS={number}\n"))
            .collect();
        let pipe = io::pipe().unwrap();
        for text in &texts {
            outgoing.send(text.clone(), &[pipe.0.as_fd()]).unwrap();
        }
        // What is stored and removed meanwhile is no matter of the manager's.
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
        let mut buffer = [0; 64];
        for text in texts.iter().map(String::as_str).chain(["READY=1\n"]) {
            let length = theirs.recv(&mut buffer).unwrap();
            assert_eq!(buffer.get(..length).unwrap(), text.as_bytes());
        }
    }
}

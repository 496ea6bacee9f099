//! [`Queue`]: the socket pair in whose queue a process's set of descriptors is, as one message.
//! Owns the form of the message, and that the newest counts; what a descriptor is for is
//! [`FdRole`]'s.

use std::collections::HashSet;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recv, sendmsg, socketpair,
};
use nix::sys::stat::fstat;
use rustix::io::ioctl_fionread;

use super::peek::peek;
use super::role::FdRole;
use super::stream_fd::StreamFd;
use super::sys::{Obtained, Source, obtain_and_send};

/// The version of a message, its first byte; then a byte for each descriptor, its role; then
/// perhaps whom the set is left to: `@`, a connection's number, a space and the number of a request
/// on it.
const FORMAT: u8 = b'1';
const LEFT_TO: char = '@';
/// A role for each descriptor, and two numbers.
const MAX_TEXT: usize = 128;

/// Descriptors and their roles.
pub(super) type Set = Vec<(FdRole, StreamFd)>;
/// A connection, and a request on it.
pub(super) type Request = (u64, u32);

/// A queue whose outdated sets are closed with this.
pub(super) struct Outdated(pub(super) Arc<Queue>);

impl Drop for Outdated {
    fn drop(&mut self) {
        self.0.drop_outdated();
    }
}

/// A queue that is given up.
pub(super) struct Emptied(pub(super) Arc<Queue>);

impl Drop for Emptied {
    fn drop(&mut self) {
        // In this order: see `ProcessFds::remove_all`.
        self.0.drop_outdated();
        self.0.clear();
    }
}

/// The socket pair in whose queue a set is.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) sender: OwnedFd,
    pub(super) receiver: OwnedFd,
    /// How many sets before the newest are to be closed.
    outdated: AtomicUsize,
    /// Held while they are.
    closing: Mutex<()>,
}

impl Queue {
    pub(super) fn new() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (sender, receiver) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        Ok(Self::of(sender, receiver))
    }

    fn of(sender: OwnedFd, receiver: OwnedFd) -> Self {
        Self {
            sender,
            receiver,
            outdated: AtomicUsize::new(0),
            closing: Mutex::default(),
        }
    }

    /// A newer set was sent: the one before it is to be closed.
    pub(super) fn outdate(&self) {
        self.outdated.fetch_add(1, Ordering::AcqRel);
    }

    /// Closes every set that is outdated. Blocks as long as that takes, also where another thread
    /// is about it.
    pub(super) fn drop_outdated(&self) {
        let _closing = self.closing.lock().unwrap_or_else(PoisonError::into_inner);
        let take = |outdated: usize| outdated.checked_sub(1);
        while self
            .outdated
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
            .is_ok()
        {
            self.drop_oldest();
        }
    }

    /// Finds out which of the pair is which, and takes the newest set.
    pub(super) fn resume(sockets: Vec<OwnedFd>) -> io::Result<(Self, Set, Option<Request>)> {
        let mut seen = HashSet::new();
        let (mut sender, mut receiver) = (None, None);
        for socket in sockets {
            let stat = fstat(&socket)?;
            // Stored twice, perhaps.
            if !seen.insert((stat.st_dev, stat.st_ino)) {
                continue;
            }
            let place = if ioctl_fionread(&socket)? > 0 {
                &mut receiver
            } else {
                &mut sender
            };
            *place = Some(socket);
        }
        let missing = || io::Error::other("the socket pair is not whole");
        let queue = Self::of(sender.ok_or_else(missing)?, receiver.ok_or_else(missing)?);
        loop {
            let (length, set, left_to) = queue.peek()?;
            if ioctl_fionread(&queue.receiver)? <= length as u64 {
                return Ok((queue, set, left_to));
            }
            queue.drop_oldest();
        }
    }

    pub(super) fn send(&self, set: &Set, left_to: Option<Request>) -> io::Result<()> {
        let text = text_of(set.iter().map(|(role, _)| *role), left_to);
        let fds: Vec<RawFd> = set.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        let parts = [IoSlice::new(&text)];
        sendmsg::<()>(self.sender.as_raw_fd(), &parts, &rights, flags, None)?;
        Ok(())
    }

    /// Obtains a descriptor and sends it with the set, in a process of its own.
    pub(super) fn obtain_and_send(
        &self,
        set: &Set,
        role: FdRole,
        left_to: Option<Request>,
        source: Source<'_>,
    ) -> io::Result<Obtained> {
        let roles = set.iter().map(|(role, _)| *role).chain([role]);
        let fds: Vec<RawFd> = set.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
        let text = text_of(roles, left_to);
        obtain_and_send(source, self.sender.as_fd(), &text, &fds)
    }

    /// The oldest set, which stays where it is, and the length of its message.
    pub(super) fn peek(&self) -> io::Result<(usize, Set, Option<Request>)> {
        let mut text = [0; MAX_TEXT];
        let (length, received) = peek(self.receiver.as_fd(), &mut text)?;
        let text = text
            .get(..length)
            .and_then(|text| str::from_utf8(text).ok());
        let (letters, left_to) = text
            .and_then(read)
            .filter(|(letters, _)| letters.len() == received.len())
            .ok_or_else(|| io::Error::other("the set is of another format"))?;
        // A role of a later version is closed.
        let known = letters
            .bytes()
            .zip(received)
            .filter_map(|(letter, fd)| Some((FdRole::of(letter)?, StreamFd::new(fd))));
        Ok((length, known.collect(), left_to))
    }

    /// Closes the oldest set: without room for control messages the kernel closes what is in it.
    fn drop_oldest(&self) {
        let _ = recv(
            self.receiver.as_raw_fd(),
            &mut [0; MAX_TEXT],
            MsgFlags::MSG_DONTWAIT,
        );
    }

    fn clear(&self) {
        while ioctl_fionread(&self.receiver).is_ok_and(|unread| unread > 0) {
            self.drop_oldest();
        }
    }
}

fn text_of(roles: impl Iterator<Item = FdRole>, left_to: Option<Request>) -> Vec<u8> {
    let mut text = vec![FORMAT];
    text.extend(roles.map(FdRole::letter));
    if let Some((connection, request)) = left_to {
        text.extend(format!("{LEFT_TO}{connection} {request}").bytes());
    }
    text
}

/// The letters of a message, and which request its set is left to; `None` if it is of another
/// format.
fn read(text: &str) -> Option<(&str, Option<Request>)> {
    let rest = text.strip_prefix(char::from(FORMAT))?;
    let Some((letters, request)) = rest.split_once(LEFT_TO) else {
        return Some((rest, None));
    };
    let (connection, request) = request.split_once(' ')?;
    Some((
        letters,
        Some((connection.parse().ok()?, request.parse().ok()?)),
    ))
}

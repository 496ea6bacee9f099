//! [`Inbox`]: the socket that `NOTIFY_SOCKET` names. Owns receiving, and that nobody but our own user is listened to; what a
//! datagram means is [`crate::service_manager::message`]'s.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, bind, setsockopt, socket, sockopt::PassCred,
};
use nix::sys::stat::{Mode, umask};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, UCred, recvmsg,
};

/// No message of the protocol is half as long.
pub(super) const MAX_MESSAGE: usize = 1024;
/// `SCM_MAX_FD`: the kernel passes no more at once.
const MAX_DESCRIPTORS: usize = 253;

/// Where the daemon finds us.
pub(super) fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("keeper.sock")
}

/// The socket.
#[derive(Debug)]
pub(super) struct Inbox {
    pub(super) socket: OwnedFd,
}

/// What came in one datagram.
#[derive(Debug)]
pub(super) struct Received {
    /// How many bytes of the buffer.
    pub(super) length: usize,
    /// Who sent it, if the kernel says.
    pub(super) sender: Option<UCred>,
    pub(super) descriptors: Vec<OwnedFd>,
    /// It was longer than the buffer.
    pub(super) is_truncated: bool,
    /// There was no room in our table for all descriptors that came.
    pub(super) lacks_descriptors: bool,
}

impl Inbox {
    /// Makes the socket anew; the caller holds the lock that says that nobody else listens there.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::Datagram, flags, None)?;
        setsockopt(&fd, PassCred, &true)?;
        // The mode of a socket file comes from the umask alone: a chmod afterwards would leave a moment for others.
        let before = umask(Mode::from_bits_truncate(0o177));
        let bound = UnixAddr::new(path).and_then(|address| bind(fd.as_raw_fd(), &address));
        umask(before);
        bound?;
        Ok(Self::resume(fd))
    }

    /// Goes on with a socket that another keeper has made.
    pub(super) fn resume(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// The next datagram, if one is there.
    pub(super) fn receive(&self, buffer: &mut [u8; MAX_MESSAGE]) -> io::Result<Option<Received>> {
        let mut space = [MaybeUninit::uninit();
            rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS), ScmCredentials(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let mut slices = [IoSliceMut::new(buffer)];
        let received = match recvmsg(&self.socket, &mut slices, &mut ancillary, flags) {
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            received => received?,
        };
        let mut sender = None;
        let mut descriptors = Vec::new();
        for message in ancillary.drain() {
            match message {
                RecvAncillaryMessage::ScmRights(received) => descriptors.extend(received),
                RecvAncillaryMessage::ScmCredentials(credentials) => sender = Some(credentials),
                _ => {}
            }
        }
        Ok(Some(Received {
            length: received.bytes,
            sender,
            descriptors,
            is_truncated: received.flags.contains(ReturnFlags::TRUNC),
            lacks_descriptors: received.flags.contains(ReturnFlags::CTRUNC),
        }))
    }
}

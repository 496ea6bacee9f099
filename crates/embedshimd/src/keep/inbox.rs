//! [`Inbox`]: the socket that `NOTIFY_SOCKET` names. Owns receiving, and that nobody but our own user is listened to; what a
//! datagram means is [`super::message`]'s.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, UnixCredentials,
    bind, recvmsg, setsockopt, socket, sockopt::PassCred,
};
use nix::sys::stat::{Mode, umask};

use crate::sys;

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
    ancillary: Vec<u8>,
}

/// What came in one datagram.
#[derive(Debug)]
pub(super) struct Received {
    /// How many bytes of the buffer.
    pub(super) length: usize,
    /// Who sent it, if the kernel says.
    pub(super) sender: Option<UnixCredentials>,
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
        Self {
            socket,
            ancillary: cmsg_space!([RawFd; MAX_DESCRIPTORS], UnixCredentials),
        }
    }

    /// The next datagram, if one is there.
    pub(super) fn receive(
        &mut self,
        buffer: &mut [u8; MAX_MESSAGE],
    ) -> io::Result<Option<Received>> {
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let mut slices = [IoSliceMut::new(buffer)];
        let own = self.socket.as_raw_fd();
        let received = match recvmsg::<()>(own, &mut slices, Some(&mut self.ancillary), flags) {
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            received => received?,
        };
        let mut sender = None;
        let mut descriptors = Vec::new();
        // An error says that there was no room in our table for what came; so does the flag.
        for message in received.cmsgs().into_iter().flatten() {
            match message {
                ControlMessageOwned::ScmRights(numbers) => {
                    descriptors.extend(
                        numbers
                            .into_iter()
                            .map_while(|number| sys::own(number).ok()),
                    );
                }
                ControlMessageOwned::ScmCredentials(credentials) => sender = Some(credentials),
                _ => {}
            }
        }
        Ok(Some(Received {
            length: received.bytes,
            sender,
            descriptors,
            is_truncated: received.flags.contains(MsgFlags::MSG_TRUNC),
            lacks_descriptors: received.flags.contains(MsgFlags::MSG_CTRUNC),
        }))
    }
}

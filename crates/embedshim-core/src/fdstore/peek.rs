//! [`peek`]: a message with descriptors, read and left in its queue. Owns that each descriptor is
//! closed on exec and has an owner; what the message means is its reader's.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use crate::sys;

/// More descriptors than a set has roles are never in a message; the kernel passes 253 at once.
const MAX_FDS: usize = 32;

/// Duplicates of the descriptors of the first message, and the length of its text. The message
/// stays. Does not wait for one (`WouldBlock`).
pub(crate) fn peek(socket: BorrowedFd<'_>, text: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut parts = [IoSliceMut::new(text)];
    let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let descriptors = message
        .cmsgs()?
        .filter_map(|control| match control {
            ControlMessageOwned::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .map(sys::own_received)
        .collect();
    if message.flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(io::Error::other("no descriptors are left (RLIMIT_NOFILE)"));
    }
    Ok((message.bytes, descriptors))
}

//! Whether an end of a stream is ready, asked without its pipe's lock, which a container may hold.

use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::fdstore::StreamFd;

/// Whether it is ready within so many milliseconds; one whose other end has gone is, too.
pub(super) fn is_ready(fd: &impl AsFd, what: PollFlags, limit: u8) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), what)];
    // It fails for a lack of memory only, or is interrupted: then the next step tells.
    poll(&mut fds, PollTimeout::from(limit)).map_or(true, |count| count > 0)
}

/// Whether there is something to read: an end alone is nothing.
pub(super) fn has_bytes(fd: &StreamFd) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    let polled = poll(&mut fds, PollTimeout::ZERO);
    let [fd] = fds;
    polled.is_ok()
        && fd
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLIN))
}

//! [`splice_or_copy`]: one transfer between two descriptors. Owns what this kernel can splice; when
//! to call it, and what its errors mean, is [`super::pump`]'s.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::poll::PollFlags;
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};

use super::open;
use super::ready::is_ready;
use crate::fdstore::StreamFd;

/// What is copied at once. It is `PIPE_BUF`, too: a pipe with room takes it at once.
const COPIED: usize = 4096;
/// How many milliseconds the rest of a copy waits at once for room.
const LINGER: u8 = 10;
/// Splicing from or to a terminal has failed with EINVAL: this kernel cannot.
static TERMINALS_CANNOT_BE_SPLICED: AtomicBool = AtomicBool::new(false);

/// Moves at most this many bytes, without waiting, by `splice(2)`. From or to a terminal that the
/// kernel cannot splice it copies them.
pub(super) fn splice_or_copy(
    from: &StreamFd,
    to: &StreamFd,
    size: usize,
) -> rustix::io::Result<usize> {
    let has_terminal = || !(open::is_pipe(from) && open::is_pipe(to));
    if TERMINALS_CANNOT_BE_SPLICED.load(Ordering::Relaxed) && has_terminal() {
        return copy(from.as_fd(), to.as_fd());
    }
    let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
    match splice(from, None, to, None, size, flags) {
        Err(Errno::INVAL) if has_terminal() => {
            TERMINALS_CANNOT_BE_SPLICED.store(true, Ordering::Relaxed);
            copy(from.as_fd(), to.as_fd())
        }
        moved => moved,
    }
}

/// Reads no more than can be written at once.
fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> rustix::io::Result<usize> {
    if !is_ready(&to, PollFlags::POLLOUT, 0) {
        return Err(Errno::AGAIN);
    }
    let mut buffer = [0; COPIED];
    let count = rustix::io::read(from, &mut buffer)?;
    let mut rest = buffer.get(..count).unwrap_or_default();
    while !rest.is_empty() {
        match rustix::io::write(to, rest) {
            Ok(written) => rest = rest.get(written..).unwrap_or_default(),
            Err(Errno::AGAIN) => drop(is_ready(&to, PollFlags::POLLOUT, LINGER)),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(count)
}

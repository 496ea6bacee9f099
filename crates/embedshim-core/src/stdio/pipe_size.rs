//! How large the pipes of a stream are: small, but while much flows. Each call here takes the
//! pipe's lock, which a container may have; when that is harmless is [`super::pump`]'s to know.

use super::append::CHUNK;
use crate::fdstore::StreamFd;

/// The size of the pipes of a stream that flows without pause, since most of its cost are changes
/// between processes. One without a reader does not flow, and stays as small as every pipe: its
/// process waits after 64 KiB.
pub(super) const LARGE: usize = 1024 * 1024;

/// Makes a pipe small that is not, unless it holds more than that.
pub(super) fn shrink(pipe: &StreamFd) {
    if rustix::pipe::fcntl_getpipe_size(pipe).is_ok_and(|size| size > CHUNK) {
        resize(pipe, CHUNK);
    }
}

/// Makes a pipe that is full larger, for what was taken already: true if it is.
pub(super) fn make_room(pipe: &StreamFd) -> bool {
    let size = rustix::pipe::fcntl_getpipe_size(pipe);
    size.is_ok_and(|size| size < LARGE && resize(pipe, 2 * size))
}

/// Sets the size of a pipe; of what is no pipe, or may not be larger, nothing.
pub(super) fn resize(pipe: &StreamFd, size: usize) -> bool {
    rustix::pipe::fcntl_setpipe_size(pipe, size).is_ok()
}

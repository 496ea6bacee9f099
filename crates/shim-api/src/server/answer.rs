//! [`StoredAnswer`]: an answer that the socket does not take as a whole, so that a kill while it is
//! sent neither loses nor repeats a byte. Owns the bytes and how much of them is sent.
//!
//! The kernel counts: the answer is a memory file, which the descriptor store holds as well, and
//! sendfile(2) moves its position by what it has sent, in one step. A short answer needs no file: a
//! socket takes all of it or nothing.

use std::fs::File;
use std::io::{self, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use embedshim_core::failpoint;
use embedshim_core::fdstore::{FdName, FdStore};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{getsockopt, sockopt};
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::frame::{HEADER, Header};

/// The kernel lets no socket have less room than 4,608 bytes (`SOCK_MIN_SNDBUF`): half of that
/// takes a shorter answer.
const SHORT: usize = 1024;
/// A longer answer is not sent as a whole: the kernel makes one buffer of so many bytes.
const WHOLE: usize = 16 * 1024;
/// How many bytes are sent at a time: a socket that can be written to has room for as many, on
/// every kernel.
const CHUNK: usize = 16 * 1024;

/// Whether the socket takes so many bytes all at once or none of them.
pub(super) fn is_sent_whole(stream: &UnixStream, length: usize) -> bool {
    // A buffer is at most half of what the socket may have.
    length <= SHORT
        || length <= WHOLE
            && getsockopt(stream, sockopt::SndBuf)
                .is_ok_and(|size| length.saturating_add(64) <= size / 2)
}

/// The descriptor store, for the answers of one connection.
#[derive(Clone, Debug)]
pub(super) struct AnswerStore {
    pub(super) store: Arc<dyn FdStore>,
    pub(super) connection: u64,
}

/// An answer that is being sent.
#[derive(Debug)]
pub(super) struct StoredAnswer(File);

impl AnswerStore {
    /// Stores an answer before its first byte is sent.
    pub(super) fn store(&self, answer: &[u8]) -> io::Result<StoredAnswer> {
        let file = File::from(memfd_create(c"answer", MFdFlags::MFD_CLOEXEC)?);
        // At an offset, so that the file's position stays at the beginning.
        file.write_all_at(answer, 0)?;
        self.store
            .add(&FdName::Answer(self.connection), &[file.as_fd()])?;
        failpoint::step("after an answer was stored");
        Ok(StoredAnswer(file))
    }

    /// Removes an answer that is sent, after that is noted.
    pub(super) fn remove(&self) -> io::Result<()> {
        self.store.remove(&FdName::Answer(self.connection))
    }
}

impl StoredAnswer {
    /// An answer that a predecessor stored.
    pub(super) fn inherited(descriptor: OwnedFd) -> Self {
        Self(File::from(descriptor))
    }

    /// The stream of the request that it answers.
    pub(super) fn stream(&self) -> io::Result<u32> {
        let mut header = [0; HEADER];
        self.0.read_exact_at(&mut header, 0)?;
        Ok(Header::decode(header).stream)
    }

    /// Sends what is not sent yet. Waits for nothing but the client, which has to read.
    pub(super) async fn send(&mut self, stream: &UnixStream) -> io::Result<()> {
        let length = self.0.metadata()?.len();
        while self.0.stream_position()? < length {
            stream.writable().await?;
            let sent = stream.try_io(Interest::WRITABLE, || self.send_some(stream));
            match sent {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => failpoint::step("after a part of an answer was sent"),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn send_some(&self, stream: &UnixStream) -> io::Result<usize> {
        let mut polled = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
        poll(&mut polled, PollTimeout::ZERO)?;
        let can_write = polled.iter().any(|fd| fd.any().unwrap_or(false));
        if !can_write {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(rustix::fs::sendfile(stream, &self.0, None, CHUNK)?)
    }
}

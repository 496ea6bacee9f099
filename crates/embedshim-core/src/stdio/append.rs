//! [`Scratch`]: appending what is in a pipe to a log file, which takes no splice. Owns that nothing
//! is taken out of the pipe before it is in the file, and the count of what a file did not take.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice, tee};
use tracing::warn;

use crate::failpoint;
use crate::fdstore::StreamFd;

/// What is moved at once, and repeated if the daemon is killed after it was appended and before it
/// was taken out.
pub(super) const CHUNK: usize = 64 * 1024;
/// The same for a stream that flows without pause: the kernel appends large pieces for a third less
/// than small ones, and no cheaper from here on.
const LARGE_CHUNK: usize = 256 * 1024;
/// The memory for a chunk begins on a page: from other addresses the kernel copies two to three
/// times slower on AMD's processors, whose `rep movsb` has a slow path for sources that are not
/// aligned as their targets are.
const PAGE: usize = 4096;
/// Bytes that a file does not take are logged once in this time.
const TELL: Duration = Duration::from_mins(1);

/// Whose bytes are moved, for the log.
#[derive(Clone, Debug)]
pub(super) struct Label {
    pub(super) id: Arc<str>,
    pub(super) stream: &'static str,
}

/// What a file did not take.
#[derive(Debug, Default)]
pub(super) struct Dropped {
    bytes: u64,
    told: Option<Instant>,
}

impl Dropped {
    /// Counts, and tells once a minute whose bytes they are.
    fn count(&mut self, bytes: usize, error: &io::Error, label: &Label) {
        self.bytes += bytes as u64;
        if self.told.is_none_or(|told| told.elapsed() >= TELL) {
            let (id, stream) = (&label.id, label.stream);
            self.told = Some(Instant::now());
            warn!(%id, stream, dropped_bytes = self.bytes, %error, "cannot write a log file: output is dropped");
            self.bytes = 0;
        }
    }
}

/// What moving to a file needs beside the two: a pipe for the copy, memory, and a place for what is
/// written.
pub(super) struct Scratch {
    reader: File,
    writer: OwnedFd,
    null: File,
    buffer: Vec<u8>,
    /// Bytes that the pipe and the memory have room for.
    chunk: usize,
}

impl Scratch {
    pub(super) fn new() -> rustix::io::Result<Self> {
        let errno = |error: &io::Error| Errno::from_io_error(error).unwrap_or(Errno::NOMEM);
        let (reader, writer) =
            pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(|error| errno(&error.into()))?;
        let null = File::options()
            .write(true)
            .open("/dev/null")
            .map_err(|error| errno(&error))?;
        Ok(Self {
            reader: reader.into(),
            writer,
            null,
            buffer: vec![0; CHUNK + PAGE],
            chunk: CHUNK,
        })
    }

    /// Moves more at once from now on, if the kernel lends it the room.
    pub(super) fn grow(&mut self) {
        if rustix::pipe::fcntl_setpipe_size(&self.writer, LARGE_CHUNK).is_ok() {
            self.buffer = vec![0; LARGE_CHUNK + PAGE];
            self.chunk = LARGE_CHUNK;
        }
    }

    /// Appends a copy of what is in the pipe, and only then takes it out. What the file does not
    /// take is dropped and counted: a full disk must not freeze the container.
    pub(super) fn append(
        &mut self,
        from: &StreamFd,
        file: &StreamFd,
        dropped: &mut Dropped,
        label: &Label,
    ) -> rustix::io::Result<usize> {
        let copied = tee(from, &self.writer, self.chunk, SpliceFlags::NONBLOCK)?;
        let mut rest = self.read(copied);
        while !rest.is_empty() {
            match rustix::io::write(file, rest) {
                Ok(written) if written > 0 => rest = rest.get(written..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                failed => {
                    let error =
                        failed.map_or_else(io::Error::from, |_| io::ErrorKind::WriteZero.into());
                    dropped.count(rest.len(), &error, label);
                    break;
                }
            }
        }
        failpoint::step("after output was appended to a log file");
        let mut left = copied;
        while left > 0 {
            match splice(from, None, &self.null, None, left, SpliceFlags::NONBLOCK) {
                Ok(0) | Err(Errno::AGAIN) => break,
                Ok(count) => left = left.saturating_sub(count),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(copied)
    }

    /// So many bytes of what was copied.
    fn read(&mut self, count: usize) -> &[u8] {
        let begin = self.buffer.as_ptr().align_offset(PAGE).min(PAGE);
        let memory = self.buffer.get_mut(begin..).unwrap_or_default();
        let mut filled = 0;
        while filled < count {
            let room = memory.get_mut(filled..count).unwrap_or_default();
            match self.reader.read(room) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        memory.get(..filled).unwrap_or_default()
    }
}

//! [`pump`]: moves the bytes of one stream until nothing flows for a moment. Owns how they are moved so that a kill at any instant
//! loses none; when to do it is [`super::flow`]'s.
//!
//! | from, to | how | a kill -9 of the daemon |
//! | --- | --- | --- |
//! | pipe to pipe or fifo | `splice(2)`: the pages change hands within the call | loses and repeats nothing |
//! | terminal to pipe or fifo, and back | `splice(2)` (Linux 5.11, and 5.10.11) | the same |
//! | pipe to file | `tee(2)`, then append, then consume | repeats at most one chunk ([`CHUNK`]) |
//! | terminal to file | spliced to a pipe that is stored, and from there as above | the same |
//! | terminal where it cannot be spliced | read and write | loses at most what is between the two, 4 KiB |
//!
//! Each pump has a thread to itself. That is needed although no descriptor blocks: a pipe's lock is held while its writer copies from
//! memory, and a container may write from a page that a hung file system has to fill.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice, tee};
use tracing::warn;

use super::open;

/// What is moved at once: all that a pipe of the usual size holds.
const CHUNK: usize = 64 * 1024;
/// The size of the pipes of a stream that flows without pause, since most of its cost are changes between processes. One that nobody
/// reads does not flow, and stays as small as every pipe: its process waits after 64 KiB.
const LARGE: usize = 1024 * 1024;
/// So much without pause makes pipes large.
const MUCH: usize = 1024 * 1024;
/// What is taken from a terminal at once, all that its buffer holds. It is `PIPE_BUF`, too: a pipe with room takes it at once.
const SMALL: usize = 4096;
/// A stream that is silent for so many milliseconds gives its thread back.
const LINGER: u8 = 10;
/// A kernel that calls both ends ready so often and moves nothing is not asked again at once.
const IN_VAIN: u32 = 16;
const PAUSE: Duration = Duration::from_millis(1);
/// Bytes that a file does not take are told of once in this time.
const TELL: Duration = Duration::from_mins(1);

/// Splicing from or to a terminal has failed with EINVAL: this kernel cannot.
static TERMINALS_CANNOT_BE_SPLICED: AtomicBool = AtomicBool::new(false);

/// Why a pump has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// Nothing has come for a moment.
    SourceEmpty,
    /// Nothing has been taken for a moment.
    SinkFull,
    /// A terminal that no process has open. One may open it again.
    HungUp,
    /// Nothing will ever come, or ever be taken.
    End,
    /// It was asked to stop.
    Asked,
}

/// Where bytes go.
#[derive(Debug)]
pub(super) enum Sink<'a> {
    /// A pipe, a fifo or a terminal, non-blocking.
    Stream(BorrowedFd<'a>),
    /// A file that is open for appending.
    File(&'a OwnedFd, &'a mut Dropped),
    /// Nowhere.
    Null,
}

/// What a file did not take.
#[derive(Debug, Default)]
pub(super) struct Dropped {
    bytes: u64,
    told: Option<Instant>,
}

impl Dropped {
    /// Counts, and tells once a minute. `id` and `stream` say whose bytes.
    fn count(&mut self, bytes: usize, error: &io::Error, id: &str, stream: &str) {
        self.bytes += bytes as u64;
        if self.told.is_none_or(|told| told.elapsed() >= TELL) {
            self.told = Some(Instant::now());
            warn!(id, stream, dropped_bytes = self.bytes, %error, "log file cannot be written: output is dropped");
            self.bytes = 0;
        }
    }
}

/// Whose bytes are moved, for the log.
#[derive(Clone, Debug)]
pub(super) struct Label {
    pub(super) id: std::sync::Arc<str>,
    pub(super) stream: &'static str,
}

/// Moves bytes until nothing flows for a moment, or `stop` is set. Blocks; to be called in a thread of its own.
pub(super) fn pump(
    source: BorrowedFd<'_>,
    mut sink: Sink<'_>,
    stop: &AtomicBool,
    label: &Label,
) -> io::Result<Stopped> {
    let mut scratch = None;
    let mut in_vain = 0;
    let mut pipes = Pipes::of(source, &sink);
    if !open::is_pipe(&source) {
        pipes.size = SMALL;
    }
    while !stop.load(Ordering::Relaxed) {
        let moved = match &mut sink {
            Sink::Stream(to) => move_to_stream(source, *to, pipes.size),
            Sink::Null => discard(source),
            Sink::File(file, dropped) => match &mut scratch {
                Some(scratch) => move_to_file(source, file, scratch, dropped, label),
                none => {
                    *none = Some(Scratch::new()?);
                    continue;
                }
            },
        };
        match moved {
            // All writers have gone; or the process does not read its input any more.
            Ok(0) | Err(Errno::PIPE) => return Ok(Stopped::End),
            Ok(count) => {
                pipes.flowed(count);
                in_vain = 0;
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                if let Some(stopped) = wait(source, &sink)? {
                    return Ok(stopped);
                }
                in_vain += 1;
                if in_vain > IN_VAIN {
                    std::thread::sleep(PAUSE);
                }
            }
            Err(Errno::IO) => return Ok(Stopped::HungUp),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(Stopped::Asked)
}

/// The pipes that a stream flows through, which are large while it flows without pause.
struct Pipes<'a> {
    ends: [Option<BorrowedFd<'a>>; 2],
    size: usize,
    flowed: usize,
}

impl<'a> Pipes<'a> {
    fn of(source: BorrowedFd<'a>, sink: &Sink<'a>) -> Self {
        let sink = match sink {
            Sink::Stream(to) => Some(*to),
            Sink::File(..) | Sink::Null => None,
        };
        Self {
            ends: [Some(source), sink],
            size: CHUNK,
            flowed: 0,
        }
    }

    fn flowed(&mut self, count: usize) {
        self.flowed = self.flowed.saturating_add(count);
        if self.flowed >= MUCH && self.size == CHUNK {
            self.resize(LARGE);
        }
    }

    /// What is no pipe, or holds more than that, or may not be larger, stays as it is.
    fn resize(&mut self, size: usize) {
        self.size = size;
        for pipe in self.ends.iter().flatten() {
            let _ = rustix::pipe::fcntl_setpipe_size(pipe, size);
        }
    }
}

impl Drop for Pipes<'_> {
    fn drop(&mut self) {
        if self.size > CHUNK {
            self.resize(CHUNK);
        }
    }
}

/// Waits a moment for what is missing; `None` if it has come.
fn wait(source: BorrowedFd<'_>, sink: &Sink<'_>) -> io::Result<Option<Stopped>> {
    let is = |fd, what, limit: u8| -> io::Result<bool> {
        let mut fds = [PollFd::new(fd, what)];
        match poll(&mut fds, PollTimeout::from(limit)) {
            Ok(count) => Ok(count > 0),
            Err(nix::errno::Errno::EINTR) => Ok(true),
            Err(errno) => Err(errno.into()),
        }
    };
    if !is(source, PollFlags::POLLIN, 0)? {
        let has_come = is(source, PollFlags::POLLIN, LINGER)?;
        return Ok((!has_come).then_some(Stopped::SourceEmpty));
    }
    match sink {
        Sink::Stream(to) if !is(*to, PollFlags::POLLOUT, LINGER)? => Ok(Some(Stopped::SinkFull)),
        _ => Ok(None),
    }
}

fn move_to_stream(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    size: usize,
) -> rustix::io::Result<usize> {
    if TERMINALS_CANNOT_BE_SPLICED.load(Ordering::Relaxed)
        && !(open::is_pipe(&from) && open::is_pipe(&to))
    {
        return copy(from, to);
    }
    let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
    match splice(from, None, to, None, size, flags) {
        Err(Errno::INVAL) => {
            TERMINALS_CANNOT_BE_SPLICED.store(true, Ordering::Relaxed);
            copy(from, to)
        }
        moved => moved,
    }
}

/// Reads no more than can be written at once.
fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> rustix::io::Result<usize> {
    let mut room = [PollFd::new(to, PollFlags::POLLOUT)];
    if poll(&mut room, PollTimeout::ZERO).is_ok_and(|ready| ready == 0) {
        return Err(Errno::AGAIN);
    }
    let mut buffer = [0; SMALL];
    let count = rustix::io::read(from, &mut buffer)?;
    let mut rest = buffer.get(..count).unwrap_or_default();
    while !rest.is_empty() {
        match rustix::io::write(to, rest) {
            Ok(written) => rest = rest.get(written..).unwrap_or_default(),
            Err(Errno::AGAIN) => {
                let mut room = [PollFd::new(to, PollFlags::POLLOUT)];
                let _ = poll(&mut room, PollTimeout::from(LINGER));
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(count)
}

fn discard(from: BorrowedFd<'_>) -> rustix::io::Result<usize> {
    let mut buffer = [0; SMALL];
    rustix::io::read(from, &mut buffer)
}

/// What moving to a file needs beside the two: a pipe for the copy, memory, and a place for what is written.
struct Scratch {
    reader: File,
    writer: OwnedFd,
    null: File,
    buffer: Vec<u8>,
}

impl Scratch {
    fn new() -> io::Result<Self> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok(Self {
            reader: reader.into(),
            writer,
            null: File::options().write(true).open("/dev/null")?,
            buffer: vec![0; CHUNK],
        })
    }
}

/// Appends a copy of what is in the pipe, and only then takes it out. What the file does not take is dropped and counted: a full disk
/// must not freeze the container.
fn move_to_file(
    from: BorrowedFd<'_>,
    file: &OwnedFd,
    scratch: &mut Scratch,
    dropped: &mut Dropped,
    label: &Label,
) -> rustix::io::Result<usize> {
    let copied = tee(from, &scratch.writer, CHUNK, SpliceFlags::NONBLOCK)?;
    let mut filled = 0;
    while filled < copied {
        let room = scratch.buffer.get_mut(filled..copied).unwrap_or_default();
        match scratch.reader.read(room) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    let mut rest = scratch.buffer.get(..filled).unwrap_or_default();
    while !rest.is_empty() {
        match rustix::io::write(file, rest) {
            Ok(written) if written > 0 => rest = rest.get(written..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            failed => {
                let error =
                    failed.map_or_else(io::Error::from, |_| io::ErrorKind::WriteZero.into());
                dropped.count(rest.len(), &error, &label.id, label.stream);
                break;
            }
        }
    }
    let mut left = copied;
    while left > 0 {
        match splice(
            from,
            None,
            scratch.null.as_fd(),
            None,
            left,
            SpliceFlags::NONBLOCK,
        ) {
            Ok(0) | Err(Errno::AGAIN) => break,
            Ok(count) => left = left.saturating_sub(count),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(copied)
}

/// Writes everything, for tests of this folder.
#[cfg(test)]
pub(super) fn fill(mut to: &File, bytes: &[u8]) {
    io::Write::write_all(&mut to, bytes).unwrap();
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    fn label() -> Label {
        Label {
            id: "c".into(),
            stream: "stdout",
        }
    }

    fn pipe() -> (OwnedFd, File) {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        (reader, writer.into())
    }

    #[test]
    fn all_of_a_pipe_arrives_and_then_its_end() {
        let ((from, writer), (result, to)) = (pipe(), pipe());
        fill(&writer, b"hello");
        let go = AtomicBool::new(false);
        let run = || pump(from.as_fd(), Sink::Stream(to.as_fd()), &go, &label()).unwrap();
        assert_eq!(run(), Stopped::SourceEmpty);
        drop(writer);
        assert_eq!(run(), Stopped::End);
        let mut text = [0; 16];
        assert_eq!(File::from(result).read(&mut text).unwrap(), 5);
    }

    #[test]
    fn a_full_sink_leaves_the_rest_in_the_source() {
        let ((from, writer), (result, to)) = (pipe(), pipe());
        fill(&to, &vec![0; CHUNK]);
        fill(&writer, b"waits");
        let go = AtomicBool::new(false);
        let run = || pump(from.as_fd(), Sink::Stream(to.as_fd()), &go, &label()).unwrap();
        assert_eq!(run(), Stopped::SinkFull);
        let mut result = File::from(result);
        let mut bytes = vec![0; CHUNK];
        result.read_exact(&mut bytes).unwrap();
        assert_eq!(run(), Stopped::SourceEmpty);
        let mut text = [0; 5];
        result.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"waits");
    }

    #[test]
    fn a_file_is_appended_to_and_what_it_does_not_take_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, "before ").unwrap();
        let (from, writer) = pipe();
        fill(&writer, b"after");
        let go = AtomicBool::new(false);
        let mut dropped = Dropped::default();
        let file = File::options().append(true).open(&path).unwrap().into();
        let sink = Sink::File(&file, &mut dropped);
        let stopped = pump(from.as_fd(), sink, &go, &label()).unwrap();
        assert_eq!(stopped, Stopped::SourceEmpty);
        assert_eq!(fs::read_to_string(&path).unwrap(), "before after");
        fill(&writer, b"more than there is room for");
        drop(writer);
        let full = File::options()
            .write(true)
            .open("/dev/full")
            .unwrap()
            .into();
        let sink = Sink::File(&full, &mut dropped);
        assert_eq!(
            pump(from.as_fd(), sink, &go, &label()).unwrap(),
            Stopped::End
        );
        assert!(dropped.told.is_some());
    }

    #[test]
    fn a_terminal_goes_both_ways_and_says_when_nobody_has_it_open() {
        let pty = nix::pty::openpty(None, None).unwrap();
        open::set_non_blocking(&pty.master).unwrap();
        let ((result, to), (from, writer)) = (pipe(), pipe());
        let go = AtomicBool::new(false);
        let mut slave = File::from(pty.slave);
        slave.write_all(b"out\n").unwrap();
        let master = pty.master.as_fd();
        let output = || pump(master, Sink::Stream(to.as_fd()), &go, &label()).unwrap();
        assert_eq!(output(), Stopped::SourceEmpty);
        fill(&writer, b"in\n");
        let input = pump(from.as_fd(), Sink::Stream(master), &go, &label()).unwrap();
        assert_eq!(input, Stopped::SourceEmpty);
        let mut text = [0; 16];
        assert_eq!(slave.read(&mut text).unwrap(), 3);
        drop(slave);
        assert_eq!(output(), Stopped::HungUp);
        let count = File::from(result).read(&mut text).unwrap();
        assert_eq!(text.get(..count).unwrap(), b"out\r\nin\r\n");
    }
}

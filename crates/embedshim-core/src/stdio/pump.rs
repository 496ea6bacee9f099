//! [`pump`]: moves the bytes of one stream until nothing flows for a moment. Owns how they are
//! moved so that a kill at any instant loses none; when to do it is [`super::flow`]'s.
//!
//! | from, to | how | a kill -9 of the daemon |
//! | --- | --- | --- |
//! | pipe to pipe or fifo | `splice(2)`: the pages change hands within the call | loses and repeats nothing |
//! | terminal to pipe or fifo, and back | `splice(2)` (Linux 5.11, and 5.10.11) | the same |
//! | pipe to file | `tee(2)`, then append, then consume | repeats at most one chunk ([`Scratch`]) |
//! | terminal to file | spliced to the stage, and from there as above | the same |
//! | terminal where it cannot be spliced | read and write | loses at most what is between the two, 4 KiB |
//!
//! Each pump has a thread to itself. That is needed although no descriptor blocks: a process in a
//! container can hold the lock of a pipe that it has open for as long as it likes. So no call has
//! the locks of both ends of a stream either: what is taken from one end is spliced to a pipe of
//! the daemon, the stage, and from there to the other end. Otherwise a client that reads would wait
//! with the daemon. Nothing is taken before the other end has room, and where that was too little
//! it is made: the stage is empty but for the moment between the two calls, in which only a kill of
//! daemon and store together would lose what is in it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::poll::PollFlags;
use rustix::io::Errno;

use super::append::{CHUNK, Dropped, Label, Scratch};
use super::open;
use super::pipe_size::{LARGE, make_room, resize, shrink};
use super::ready::is_ready;
use super::splice::splice_or_copy;
use crate::fdstore::{FdRole, ProcessFds, StreamFd};

/// So much without pause makes pipes large.
const MUCH: usize = 1024 * 1024;
/// What is taken from a terminal at once, all that its buffer holds. It is `PIPE_BUF`, too: a pipe
/// with room takes it at once.
const SMALL: usize = 4096;
/// A stream that is silent for so many milliseconds gives its thread back.
const LINGER: u8 = 10;
/// A kernel that calls both ends ready so often and moves nothing is not asked again at once.
const IN_VAIN: u32 = 16;
const PAUSE: Duration = Duration::from_millis(1);

/// Why a pump has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// Nothing has come for a moment, and nothing is on its way.
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

/// What a stream goes through: roles of its process's descriptors. They are looked up for each
/// step, so that what is removed from the set is not held any longer than the step takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    /// The first of these that there is.
    pub(super) source: &'static [FdRole],
    /// A pipe between the two, unless a file takes what comes out of a pipe, or it is
    /// dropped.
    pub(super) stage: Option<FdRole>,
    /// Nothing: what comes is dropped.
    pub(super) sink: Option<FdRole>,
}

/// What a pump and those who wait for it share.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// It is to stop.
    pub(super) stop: AtomicBool,
    /// Bytes that have reached the sink.
    pub(super) moved: AtomicU64,
}

impl Progress {
    pub(super) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn add(&self, bytes: usize) {
        self.moved.fetch_add(bytes as u64, Ordering::Release);
    }
}

/// One stream's machine for one run of [`pump`].
struct Pump<'a> {
    way: Way,
    fds: &'a ProcessFds,
    progress: &'a Progress,
    label: &'a Label,
    dropped: &'a mut Dropped,
    scratch: Option<Scratch>,
    /// What is moved at once.
    size: usize,
    flowed: usize,
}

/// Moves bytes until nothing flows for a moment, or it is to stop; `true` if any were moved.
/// Blocks; to be called in a thread of its own.
pub(super) fn pump(
    way: Way,
    fds: &ProcessFds,
    dropped: &mut Dropped,
    progress: &Progress,
    label: &Label,
) -> io::Result<(Stopped, bool)> {
    let mut pump = Pump {
        way,
        fds,
        progress,
        label,
        dropped,
        scratch: None,
        size: CHUNK,
        flowed: 0,
    };
    let stopped = pump.run();
    pump.shrink();
    Ok((stopped?, pump.flowed > 0))
}

impl Pump<'_> {
    fn run(&mut self) -> io::Result<Stopped> {
        let mut in_vain = 0;
        // What a predecessor has left there.
        let is_left = self
            .stage()
            .is_some_and(|stage| is_ready(&stage, PollFlags::POLLIN, 0));
        let mut on_its_way = if is_left { usize::MAX } else { 0 };
        while !self.progress.is_stopped() {
            if on_its_way > 0
                && let Some(stopped) = self.deliver(on_its_way)?
            {
                return Ok(stopped);
            }
            on_its_way = 0;
            if self.way.stage.is_some()
                && let Some(sink) = self.sink()
                && !is_ready(&sink, PollFlags::POLLOUT, LINGER)
            {
                return Ok(Stopped::SinkFull);
            }
            let Some((role, source)) = self.fds.first(self.way.source) else {
                return Ok(Stopped::End);
            };
            match self.take(role, &source) {
                Ok(0) => return Ok(Stopped::End),
                Ok(count) => {
                    on_its_way = self.way.stage.map_or(0, |_| count);
                    in_vain = 0;
                    self.grow(count, &source);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !is_ready(&source, PollFlags::POLLIN, LINGER) {
                        return Ok(Stopped::SourceEmpty);
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

    fn stage(&self) -> Option<StreamFd> {
        self.fds.get(self.way.stage?)
    }

    fn sink(&self) -> Option<StreamFd> {
        self.fds.get(self.way.sink?)
    }

    /// Takes what is in the source: to the stage, to a file, or to nowhere.
    fn take(&mut self, role: FdRole, source: &StreamFd) -> rustix::io::Result<usize> {
        if let Some(stage) = self.stage() {
            let size = if role == FdRole::Terminal {
                SMALL
            } else {
                self.size.min(self.room())
            };
            return splice_or_copy(source, &stage, size);
        }
        match (self.way.stage, self.way.sink) {
            (None, None) => rustix::io::read(source, &mut [0; SMALL]),
            (None, Some(_)) => match self.sink() {
                Some(file) => self.append(source, &file),
                None => Ok(0),
            },
            // The stream is given up.
            (Some(_), _) => Ok(0),
        }
    }

    /// How much the sink takes, but never nothing; unlimited when much flows. More would make the
    /// sink larger ([`make_room`]), which then takes more again, up to the largest pipe.
    fn room(&self) -> usize {
        let sink = self.sink().filter(|_| self.size == CHUNK);
        let size = sink.as_ref().map(rustix::pipe::fcntl_getpipe_size);
        let (Some(sink), Some(Ok(size))) = (sink, size) else {
            return usize::MAX;
        };
        let unread = rustix::io::ioctl_fionread(&sink).unwrap_or(0);
        let unread = usize::try_from(unread).unwrap_or(size);
        size.saturating_sub(unread).max(SMALL)
    }

    /// Moves what is in the stage to the sink, at most so many bytes. `None` when it is empty.
    fn deliver(&mut self, most: usize) -> io::Result<Option<Stopped>> {
        let mut left = most;
        while !self.progress.is_stopped() {
            let (Some(stage), Some(sink)) = (self.stage(), self.sink()) else {
                return Ok(Some(Stopped::End));
            };
            let moved = if open::takes_splice(&sink) {
                splice_or_copy(&stage, &sink, self.size)
            } else {
                self.append(&stage, &sink)
            };
            match moved {
                Ok(count) => {
                    self.progress.add(count);
                    left = left.saturating_sub(count);
                    if left == 0 {
                        return Ok(None);
                    }
                }
                Err(Errno::INTR) => {}
                // The stage is open for writing too: that is no end.
                Err(Errno::AGAIN) if !is_ready(&stage, PollFlags::POLLIN, 0) => return Ok(None),
                Err(Errno::AGAIN) => {
                    if !make_room(&sink) && !is_ready(&sink, PollFlags::POLLOUT, LINGER) {
                        return Ok(Some(Stopped::SinkFull));
                    }
                }
                // The process does not read its input any more.
                Err(Errno::PIPE) => return Ok(Some(Stopped::End)),
                Err(Errno::IO) => return Ok(Some(Stopped::HungUp)),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(Some(Stopped::Asked))
    }

    fn append(&mut self, from: &StreamFd, file: &StreamFd) -> rustix::io::Result<usize> {
        let scratch = match &mut self.scratch {
            Some(scratch) => scratch,
            none => none.insert(Scratch::new()?),
        };
        scratch.append(from, file, self.dropped, self.label)
    }

    /// Makes the pipes large when much has flowed without pause.
    fn grow(&mut self, count: usize, source: &StreamFd) {
        self.flowed = self.flowed.saturating_add(count);
        if self.size == CHUNK
            && self.flowed >= MUCH
            && open::is_pipe(source)
            && self.stage().is_none_or(|stage| resize(&stage, LARGE))
        {
            self.size = LARGE;
            resize(source, LARGE);
            if let Some(scratch) = &mut self.scratch {
                scratch.grow();
            }
            if let Some(sink) = self.sink() {
                resize(&sink, LARGE);
            }
        }
    }

    /// Makes large pipes small again, those of an earlier run as well. One that holds more than
    /// that stays as it is for now. A container may have the source's lock: it comes last, and the
    /// sink, whose client is to get its end nevertheless, is not held then.
    fn shrink(&self) {
        let shrink = |pipe: Option<StreamFd>| {
            if let Some(pipe) = pipe {
                shrink(&pipe);
            }
        };
        shrink(self.sink());
        shrink(self.stage());
        shrink(self.fds.first(self.way.source).map(|(_, fd)| fd));
    }
}

/// Writes everything, for tests of this folder.
#[cfg(test)]
pub(super) fn fill(mut to: &std::fs::File, bytes: &[u8]) {
    io::Write::write_all(&mut to, bytes).unwrap();
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::{Read, Write};
    use std::os::fd::OwnedFd;
    use std::sync::Arc;

    use nix::fcntl::OFlag;
    use nix::unistd::pipe2;

    use super::*;
    use crate::fdstore::NoFdStore;

    const OUTPUT: Way = Way {
        source: &[FdRole::StdoutPipe],
        stage: Some(FdRole::StdoutStage),
        sink: Some(FdRole::StdoutClient),
    };

    fn set<const N: usize>(ends: [(FdRole, OwnedFd); N]) -> ProcessFds {
        let fds = ProcessFds::new(Arc::new(NoFdStore), 1);
        let ends = ends.map(|(role, fd)| (role, StreamFd::new(fd)));
        fds.insert(ends).unwrap();
        fds
    }

    fn run(way: Way, fds: &ProcessFds) -> Stopped {
        let label = Label {
            id: "c".into(),
            stream: "stdout",
        };
        let (progress, mut dropped) = (Progress::default(), Dropped::default());
        pump(way, fds, &mut dropped, &progress, &label).unwrap().0
    }

    fn pipe() -> (OwnedFd, File) {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        (reader, writer.into())
    }

    fn staged(from: OwnedFd, to: File) -> ProcessFds {
        set([
            (FdRole::StdoutPipe, from),
            (FdRole::StdoutStage, open::stage().unwrap()),
            (FdRole::StdoutClient, to.into()),
        ])
    }

    #[test]
    fn all_of_a_pipe_arrives_and_then_its_end() {
        let ((from, writer), (result, to)) = (pipe(), pipe());
        fill(&writer, b"hello");
        let fds = staged(from, to);
        assert_eq!(run(OUTPUT, &fds), Stopped::SourceEmpty);
        drop(writer);
        assert_eq!(run(OUTPUT, &fds), Stopped::End);
        let mut text = [0; 16];
        assert_eq!(File::from(result).read(&mut text).unwrap(), 5);
    }

    #[test]
    fn a_full_sink_leaves_the_rest_where_it_is() {
        let ((from, writer), (result, to)) = (pipe(), pipe());
        fill(&to, &vec![0; CHUNK]);
        fill(&writer, b"waits");
        drop(writer);
        let fds = staged(from, to);
        assert_eq!(run(OUTPUT, &fds), Stopped::SinkFull);
        let stage = fds.get(FdRole::StdoutStage).unwrap();
        assert!(!is_ready(&stage, PollFlags::POLLIN, 0), "it is on its way");
        let mut result = File::from(result);
        let mut bytes = vec![0; CHUNK];
        result.read_exact(&mut bytes).unwrap();
        // It has ended, and that comes after what is on its way.
        assert_eq!(run(OUTPUT, &fds), Stopped::End);
        let mut text = [0; 5];
        result.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"waits");
    }

    #[test]
    fn a_client_that_does_not_read_gets_no_more_than_its_pipe_holds() {
        let ((from, mut writer), (result, to)) = (pipe(), pipe());
        fill(&to, &vec![1; CHUNK - SMALL]);
        let fds = staged(from, to);
        let typing = std::thread::spawn(move || {
            let flags = nix::fcntl::FcntlArg::F_SETFL(OFlag::empty());
            nix::fcntl::fcntl(&writer, flags).unwrap();
            // It is given up in the end.
            let _ = writer.write_all(&vec![1; LARGE]);
        });
        for _ in 0..5 {
            assert_eq!(run(OUTPUT, &fds), Stopped::SinkFull);
        }
        let unread = rustix::io::ioctl_fionread(&result).unwrap();
        assert_eq!(unread, CHUNK as u64);
        fds.remove_all();
        drop(result);
        typing.join().unwrap();
    }

    #[test]
    fn much_makes_pipes_large_and_a_pause_makes_them_small() {
        let ((from, writer), (result, to)) = (pipe(), pipe());
        let fds = staged(from, to);
        let reader = std::thread::spawn(move || {
            let flags = nix::fcntl::FcntlArg::F_SETFL(OFlag::empty());
            nix::fcntl::fcntl(&result, flags).unwrap();
            let mut bytes = Vec::new();
            File::from(result).read_to_end(&mut bytes).unwrap();
            bytes.len()
        });
        let typing = std::thread::spawn(move || {
            let flags = nix::fcntl::FcntlArg::F_SETFL(OFlag::empty());
            nix::fcntl::fcntl(&writer, flags).unwrap();
            fill(&writer, &vec![1; 8 * LARGE]);
        });
        while run(OUTPUT, &fds) != Stopped::End {}
        typing.join().unwrap();
        let source = fds.get(FdRole::StdoutPipe).unwrap();
        let size = rustix::pipe::fcntl_getpipe_size(&source).unwrap();
        assert_eq!(size, CHUNK);
        fds.remove_all();
        assert_eq!(reader.join().unwrap(), 8 * LARGE);
    }

    #[test]
    fn a_file_is_appended_to_and_what_it_does_not_take_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, "before ").unwrap();
        let (from, writer) = pipe();
        fill(&writer, b"after");
        let file = File::options().append(true).open(&path).unwrap();
        let way = Way {
            stage: None,
            ..OUTPUT
        };
        let fds = set([
            (FdRole::StdoutPipe, from),
            (FdRole::StdoutClient, file.into()),
        ]);
        assert_eq!(run(way, &fds), Stopped::SourceEmpty);
        assert_eq!(fs::read_to_string(&path).unwrap(), "before after");
        fill(&writer, b"more than there is room for");
        drop(writer);
        let full = File::options().write(true).open("/dev/full").unwrap();
        fds.insert([(FdRole::StdoutClient, StreamFd::new(full))])
            .unwrap();
        assert_eq!(run(way, &fds), Stopped::End);
    }

    #[test]
    fn a_terminal_goes_both_ways_and_says_when_nobody_has_it_open() {
        let pty = nix::pty::openpty(None, None).unwrap();
        crate::stdio::non_blocking::set_non_blocking(&pty.master).unwrap();
        let ((result, to), (from, writer)) = (pipe(), pipe());
        let mut slave = File::from(pty.slave);
        slave.write_all(b"out\n").unwrap();
        let fds = set([
            (FdRole::Terminal, pty.master),
            (FdRole::StdoutStage, open::stage().unwrap()),
            (FdRole::StdoutClient, to.into()),
            (FdRole::StdinHeld, from),
            (FdRole::StdinStage, open::stage().unwrap()),
        ]);
        let output = Way {
            source: &[FdRole::Terminal],
            ..OUTPUT
        };
        let input = Way {
            source: &[FdRole::StdinHeld],
            stage: Some(FdRole::StdinStage),
            sink: Some(FdRole::Terminal),
        };
        assert_eq!(run(output, &fds), Stopped::SourceEmpty);
        fill(&writer, b"in\n");
        assert_eq!(run(input, &fds), Stopped::SourceEmpty);
        let mut text = [0; 16];
        assert_eq!(slave.read(&mut text).unwrap(), 3);
        drop(slave);
        assert_eq!(run(output, &fds), Stopped::HungUp);
        let count = File::from(result).read(&mut text).unwrap();
        assert_eq!(text.get(..count).unwrap(), b"out\r\nin\r\n");
    }
}

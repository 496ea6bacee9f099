//! The copying between a terminal's master and a client's files. Nothing is lost to a slow reader: it makes the process wait.
//! No memory is held while nothing flows, and nothing is read before there is room for it: what was read from a terminal and not
//! written is lost with the daemon.

use std::fs::File;
use std::future::pending;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::AsyncWriteExt;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use super::StdioError;
use super::plan::{Kind, Output, append, open_output};
use crate::sys;

/// What is read at once: no more than a pipe that can be written to takes at once (`PIPE_BUF`). On the stack: it is never held across
/// a wait.
const CHUNK: usize = 4096;
/// After the end of its process a terminal that others hold open is done when it has been silent for this long. Long
/// enough for the kernel's own buffering, which goes through a work queue.
const SILENCE: Duration = Duration::from_millis(200);

/// Where a terminal's output goes.
#[derive(Debug)]
pub(super) enum Sink {
    Null,
    Fifo(AsyncFd<File>),
    File(tokio::fs::File),
}

impl Sink {
    /// `pipe` is the logger's, if the output goes to one.
    pub(super) fn open(output: &Output, pipe: Option<OwnedFd>) -> Result<Self, StdioError> {
        let failed = |source| StdioError::Console {
            doing: "watch the terminal's output",
            source,
        };
        Ok(match output {
            Output::Null => Self::Null,
            // A terminal has no error output of its own: that pipe is closed here.
            Output::Logger(_) => match pipe {
                Some(pipe) => Self::Fifo(non_blocking(pipe).map_err(failed)?),
                None => Self::Null,
            },
            Output::File(path) => {
                Self::File(tokio::fs::File::from_std(append("stdout", path)?.into()))
            }
            Output::Path(path) => match open_output(path)? {
                (fifo, Kind::Fifo) => Self::Fifo(sys::register(fifo).map_err(failed)?),
                (file, Kind::File) => Self::File(tokio::fs::File::from_std(file)),
            },
        })
    }

    /// Waits until a chunk can be written at once.
    async fn has_room(&self) -> io::Result<()> {
        let Self::Fifo(fifo) = self else {
            return Ok(());
        };
        loop {
            let mut ready = fifo.writable().await?;
            // The runtime remembers a readiness until a write fails; the kernel knows better.
            let mut fds = [PollFd::new(fifo.get_ref().as_fd(), PollFlags::POLLOUT)];
            if poll(&mut fds, PollTimeout::ZERO)? > 0 {
                return Ok(());
            }
            ready.clear_ready();
        }
    }

    async fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Null => Ok(()),
            Self::File(file) => file.write_all(bytes).await,
            Self::Fifo(fifo) => {
                while !bytes.is_empty() {
                    let mut ready = fifo.writable().await?;
                    if let Ok(written) = ready.try_io(|fifo| fifo.get_ref().write(bytes)) {
                        bytes = bytes.get(written?..).unwrap_or_default();
                    }
                }
                Ok(())
            }
        }
    }
}

/// Makes a descriptor fit for waiting on it.
pub(super) fn non_blocking(fd: OwnedFd) -> io::Result<AsyncFd<File>> {
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    sys::register(File::from(fd))
}

/// Copies until nobody has the terminal open any more, or its process has ended and it is silent.
pub(super) async fn copy_output(
    master: AsyncFd<File>,
    mut sink: Sink,
    mut process_ended: watch::Receiver<bool>,
) -> io::Result<()> {
    loop {
        let next = async {
            sink.has_room().await?;
            read_chunk(&master).await
        };
        let chunk = tokio::select! {
            chunk = next => chunk?,
            () = exhausted(&master, &mut process_ended) => return Ok(()),
        };
        if chunk.is_empty() {
            return Ok(());
        }
        sink.write_all(&chunk).await?;
    }
}

/// Waits until the process has ended and its terminal has been silent and is empty.
async fn exhausted(master: &AsyncFd<File>, process_ended: &mut watch::Receiver<bool>) {
    // The sender is gone only with the whole console.
    if process_ended.wait_for(|ended| *ended).await.is_err() {
        pending::<()>().await;
    }
    loop {
        tokio::time::sleep(SILENCE).await;
        let mut fds = [PollFd::new(master.get_ref().as_fd(), PollFlags::POLLIN)];
        let polled = poll(&mut fds, PollTimeout::ZERO);
        let [fd] = fds;
        let has_more = fd
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLIN));
        if polled.is_err() || !has_more {
            return;
        }
    }
}

/// Copies until the client's and our own writers are gone, or the terminal is.
pub(super) async fn copy_input(stdin: AsyncFd<File>, master: AsyncFd<File>) -> io::Result<()> {
    let mut terminal = Sink::Fifo(master);
    loop {
        terminal.has_room().await?;
        let chunk = read_chunk(&stdin).await?;
        if chunk.is_empty() {
            return Ok(());
        }
        terminal.write_all(&chunk).await?;
    }
}

/// The next bytes; none at the end. A terminal's master says EIO when the last slave is closed and all is read.
async fn read_chunk(file: &AsyncFd<File>) -> io::Result<Vec<u8>> {
    loop {
        let mut ready = file.readable().await?;
        let mut buffer = [0; CHUNK];
        match ready.try_io(|file| file.get_ref().read(&mut buffer)) {
            Err(_not_ready) => {}
            Ok(Err(e)) if e.raw_os_error() == Some(Errno::EIO as i32) => return Ok(Vec::new()),
            Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(e)) => return Err(e),
            Ok(Ok(count)) => return Ok(buffer.get(..count).unwrap_or_default().to_vec()),
        }
    }
}

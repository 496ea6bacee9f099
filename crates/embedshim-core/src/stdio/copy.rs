//! The copying between a terminal's master and a client's files. Nothing is lost to a slow reader: it makes the process wait.
//! No memory is held while nothing flows.

use std::fs::File;
use std::future::pending;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::AsyncWriteExt;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use super::StdioError;
use super::logger::LoggerPipes;
use super::plan::{Kind, Output, append, open_output};
use crate::sys;

/// What is read at once. On the stack: it is never held across a wait.
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
    /// `pipes` are the logger's, if the output goes to one.
    pub(super) fn open(output: &Output, pipes: Option<LoggerPipes>) -> Result<Self, StdioError> {
        let failed = |source| StdioError::Console {
            doing: "watch the terminal's output",
            source,
        };
        Ok(match output {
            Output::Null => Self::Null,
            // A terminal has no error output of its own: that pipe is closed here.
            Output::Logger(_) => match pipes {
                Some(pipes) => Self::Fifo(non_blocking(pipes.stdout).map_err(failed)?),
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
        let silent = async {
            // The sender is gone only with the whole console.
            if process_ended.wait_for(|ended| *ended).await.is_err() {
                pending::<()>().await;
            }
            tokio::time::sleep(SILENCE).await;
        };
        let chunk = tokio::select! {
            chunk = read_chunk(&master) => chunk?,
            () = silent => return Ok(()),
        };
        if chunk.is_empty() {
            return Ok(());
        }
        sink.write_all(&chunk).await?;
    }
}

/// Copies until the client's and our own writers are gone, or the terminal is.
pub(super) async fn copy_input(stdin: AsyncFd<File>, master: AsyncFd<File>) -> io::Result<()> {
    let mut terminal = Sink::Fifo(master);
    loop {
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

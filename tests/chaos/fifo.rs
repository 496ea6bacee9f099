//! [`Reader`] and [`Writer`]: the ends of fifos that a client has, as Go's are: a reader waits in
//! `open` until a writer is there, reads until the first EOF, and never after it.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use testbed::sandbox::until;

/// What a reader takes at once; Go's `io.Copy` takes 32 KiB.
const PIECE: usize = 32 * 1024;
const SLOW_PIECE: usize = 4096;
/// A slow reader rests so long after each piece.
const REST: Duration = Duration::from_millis(4);
/// An input is written in so many pieces.
const PIECES: usize = 20;
/// A writer rests so long after each.
const PAUSE: Duration = Duration::from_millis(5);

#[derive(Debug, Default)]
struct Progress {
    bytes: Vec<u8>,
    is_open: bool,
    end: Option<Result<(), String>>,
}

/// The reader of an output, in a thread of its own.
#[derive(Debug)]
pub(crate) struct Reader {
    path: PathBuf,
    read: Arc<Mutex<Progress>>,
}

impl Reader {
    /// Begins to open the fifo, and to read it.
    pub(crate) fn start(path: &Path, is_slow: bool) -> Self {
        let read = Arc::<Mutex<Progress>>::default();
        let (own, fifo) = (Arc::clone(&read), path.to_owned());
        // A client whose thread does not run for half a second does not read: its output is not
        // waited for.
        let (runs, running) = std::sync::mpsc::sync_channel(0);
        std::thread::spawn(move || {
            let _ = runs.send(());
            let end = read_all(&fifo, is_slow, &own);
            lock(&own).end = Some(end.map_err(|error| error.to_string()));
        });
        let _ = running.recv();
        Self {
            path: path.into(),
            read,
        }
    }

    /// What has come so far.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        lock(&self.read).bytes.clone()
    }

    /// How much that is.
    pub(crate) fn length(&self) -> usize {
        lock(&self.read).bytes.len()
    }

    /// Whether it has come to its end.
    pub(crate) fn has_ended(&self) -> anyhow::Result<bool> {
        match &lock(&self.read).end {
            None => Ok(false),
            Some(Ok(())) => Ok(true),
            Some(Err(error)) => Err(anyhow!("{}: {error}", self.path.display())),
        }
    }

    /// A fifo that no writer has opened, and none will: what waits in `open` waits no longer.
    pub(crate) fn give_up(&self) {
        if !lock(&self.read).is_open {
            let _ = open_writer(&self.path);
        }
    }
}

fn lock(read: &Mutex<Progress>) -> MutexGuard<'_, Progress> {
    read.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read_all(path: &Path, is_slow: bool, read: &Mutex<Progress>) -> std::io::Result<()> {
    let mut fifo = File::open(path)?;
    lock(read).is_open = true;
    let mut piece = vec![0; if is_slow { SLOW_PIECE } else { PIECE }];
    loop {
        match fifo.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                let came = piece.get(..count).unwrap_or_default();
                lock(read).bytes.extend_from_slice(came);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if is_slow {
            sleep(REST);
        }
    }
}

/// The writer of an input, in a thread of its own, which holds the fifo until
/// [`finish`](Self::finish).
#[derive(Debug)]
pub(crate) struct Writer(JoinHandle<std::io::Result<File>>);

impl Writer {
    /// Opens the input, which another process must hold open for reading, and begins to write.
    pub(crate) fn start(path: &Path, bytes: Vec<u8>) -> anyhow::Result<Self> {
        let mut fifo = open_writer(path).context("no reader has the input open")?;
        let write = move || {
            for piece in bytes.chunks(bytes.len() / PIECES + 1) {
                fifo.write_all(piece)?;
                sleep(PAUSE);
            }
            Ok(fifo)
        };
        Ok(Self(std::thread::spawn(write)))
    }

    /// Waits until everything is written, and closes the input.
    pub(crate) fn finish(self) -> anyhow::Result<()> {
        until("the input is taken", || Ok(self.0.is_finished()))?;
        let written = self.0.join();
        ensure!(written.is_ok(), "the writer of an input panicked");
        let written = written.unwrap_or_else(|_| Err(ErrorKind::Other.into()));
        written.map(drop).context("cannot write the input")
    }
}

/// Opening waits for no reader; writing waits for room.
fn open_writer(path: &Path) -> anyhow::Result<File> {
    let mut options = File::options();
    let options = options.write(true).custom_flags(OFlag::O_NONBLOCK.bits());
    let fifo = options.open(path)?;
    fcntl(&fifo, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(fifo)
}

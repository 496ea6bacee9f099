//! [`LogFile`]: stderr, if that is the log file which the launcher has made in the state directory.
//! Owns that the file is bounded, since it is on tmpfs, which is memory: at [`MAX`] it is renamed
//! to `embedshimd.log.1`, which replaces an older one, and a new file is begun. Owns also that
//! lines go to the file that is at the path, when that was removed, or renamed by another process.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write, stderr};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{dup2_stderr, dup2_stdout};
use tracing_subscriber::fmt::MakeWriter;

use crate::state_dir::file_id::FileId;

/// The name that the launcher gives to the file.
const NAME: &str = "embedshimd.log";
/// The most bytes of a file, and what is written between two looks.
const MAX: u64 = 4 * 1024 * 1024;
/// The least time between two looks at the file: a container's life has five lines.
const PAUSE: Duration = Duration::from_millis(100);

/// Where log lines go.
#[derive(Debug)]
pub(super) struct LogFile {
    /// `None`: stderr is something else, such as journald or a terminal.
    path: Option<PathBuf>,
    max: u64,
    looked: Mutex<Option<Instant>>,
}

impl LogFile {
    /// Stderr, which is treated as the log file of this state directory if it is that file.
    pub(super) fn new(state_dir: &Path) -> Self {
        let path = state_dir.join(NAME);
        let is_log_file = stderr_file().is_some_and(|(id, _)| Some(id) == FileId::at(&path));
        Self {
            path: is_log_file.then_some(path),
            max: MAX,
            looked: Mutex::default(),
        }
    }

    /// Whether it is time for another look.
    fn is_due(&self) -> bool {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = looked.is_none_or(|last| last.elapsed() >= PAUSE);
        if is_due {
            *looked = Some(Instant::now());
        }
        is_due
    }

    /// Rotates the file if it is full, and turns stderr to the file at the path. It is called
    /// before each line. A failure leaves stderr as it is.
    fn rotate(&self) {
        let Some(path) = self.path.as_ref().filter(|_| self.is_due()) else {
            return;
        };
        let Some((id, length)) = stderr_file() else {
            return;
        };
        let is_at_path = Some(id) == FileId::at(path);
        if is_at_path && length < self.max {
            return;
        }
        if is_at_path {
            rename_full(path, self.max);
        }
        if let Ok(file) = open(path) {
            let _ = dup2_stderr(&file);
            let _ = dup2_stdout(&file);
        }
    }
}

/// Renames a full file, unless another process has just done that.
fn rename_full(path: &Path, max: u64) {
    let Ok(file) = open(path) else { return };
    let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
        return;
    };
    let is_full = lock
        .metadata()
        .is_ok_and(|file| file.len() >= max && Some((&file).into()) == FileId::at(path));
    if is_full {
        let _ = fs::rename(path, path.with_extension("log.1"));
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

/// The id and the length of the file that stderr is; `None` if it is no regular file.
fn stderr_file() -> Option<(FileId, u64)> {
    let file = File::from(stderr().as_fd().try_clone_to_owned().ok()?);
    let metadata = file.metadata().ok()?;
    metadata
        .is_file()
        .then(|| ((&metadata).into(), metadata.len()))
}

impl<'a> MakeWriter<'a> for LogFile {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        self.rotate();
        Line
    }
}

/// The writer of one line of the log.
#[derive(Debug)]
pub(super) struct Line;

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        stderr().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_file_becomes_the_one_predecessor() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(NAME);
        fs::write(&path, "first, which is long enough").unwrap();
        rename_full(&path, 10);
        let predecessor = directory.path().join("embedshimd.log.1");
        assert!(!path.exists() && predecessor.exists());
        fs::write(&path, "short").unwrap();
        rename_full(&path, 10);
        assert!(path.exists(), "it was not full");
        fs::write(&path, "second, which is long enough").unwrap();
        rename_full(&path, 10);
        let renamed = fs::read_to_string(predecessor).unwrap();
        assert_eq!(renamed, "second, which is long enough");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}

//! [`LogFile`]: stderr, when that is the log file which a launcher has made in the state directory.
//! Owns that it is bounded, since it is on tmpfs, which is memory: at [`MAX`] it becomes the one
//! predecessor, `embedshimd.log.1`, and another is begun. Owns too that lines go to the file that
//! is at the path, when that was removed or the keeper has begun another.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Write, stderr};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{dup2_stderr, dup2_stdout};
use tracing_subscriber::fmt::MakeWriter;

/// The name that the launcher gives it.
const NAME: &str = "embedshimd.log";
/// A file is not longer than this and one line.
pub(crate) const MAX: u64 = 4 * 1024 * 1024;

/// Where log lines go.
#[derive(Debug)]
pub(crate) struct LogFile {
    /// `None`: stderr is something else, a journal or a terminal.
    path: Option<PathBuf>,
    max: u64,
}

impl LogFile {
    /// stderr, and the file of this state directory if it is that.
    pub(crate) fn of(state_dir: &Path) -> Self {
        let path = state_dir.join(NAME);
        let is_it = own().is_some_and(|own| is_at(&own, &path));
        Self {
            path: is_it.then_some(path),
            max: MAX,
        }
    }

    /// Called before each line. What fails leaves stderr as it is.
    fn look_after(&self) {
        let Some(path) = &self.path else { return };
        let Some(own) = own() else { return };
        if is_at(&own, path) && own.len() < self.max {
            return;
        }
        if is_at(&own, path) {
            set_aside(path, self.max);
        }
        if let Ok(file) = open(path) {
            let _ = dup2_stderr(&file);
            let _ = dup2_stdout(&file);
        }
    }
}

/// Renames the file, unless another process has just done it.
fn set_aside(path: &Path, max: u64) {
    let Ok(file) = open(path) else { return };
    let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
        return;
    };
    let is_full = lock
        .metadata()
        .is_ok_and(|file| file.len() >= max && is_at(&file, path));
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

/// The file that stderr is.
fn own() -> Option<Metadata> {
    let own = File::from(
        std::os::fd::AsFd::as_fd(&stderr())
            .try_clone_to_owned()
            .ok()?,
    );
    own.metadata().ok().filter(Metadata::is_file)
}

fn is_at(file: &Metadata, path: &Path) -> bool {
    path.symlink_metadata()
        .is_ok_and(|there| (there.dev(), there.ino()) == (file.dev(), file.ino()))
}

impl<'a> MakeWriter<'a> for LogFile {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        self.look_after();
        Line
    }
}

/// One line of the log.
#[derive(Debug)]
pub(crate) struct Line;

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
        set_aside(&path, 10);
        let predecessor = directory.path().join("embedshimd.log.1");
        assert!(!path.exists() && predecessor.exists());
        fs::write(&path, "short").unwrap();
        set_aside(&path, 10);
        assert!(path.exists(), "it was not full");
        fs::write(&path, "second, which is long enough").unwrap();
        set_aside(&path, 10);
        let kept = fs::read_to_string(predecessor).unwrap();
        assert_eq!(kept, "second, which is long enough");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}

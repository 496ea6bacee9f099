//! The lock files of a state directory: one daemon (`lock`), one keeper (`keeper.lock`). Each begins with its owner's pid and
//! version, one a line; a file that nobody has locked says nothing.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// The version that is written.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The daemon's.
pub(crate) fn of_daemon(state_dir: &Path) -> PathBuf {
    state_dir.join("lock")
}

/// The keeper's.
pub(crate) fn of_keeper(state_dir: &Path) -> PathBuf {
    state_dir.join("keeper.lock")
}

/// Makes the state directory and takes one of its locks; `None` if somebody else has it.
pub(crate) fn take(state_dir: &Path, path: &Path) -> anyhow::Result<Option<Flock<File>>> {
    shim_api::state_dir::create(state_dir)
        .with_context(|| format!("cannot create the state directory {}", state_dir.display()))?;
    shim_api::state_dir::check(state_dir)
        .with_context(|| format!("cannot use the state directory {}", state_dir.display()))?;
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot write to the state directory: {}", path.display()))?;
    let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => lock,
        Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
        Err((_, errno)) => {
            return Err(
                anyhow::Error::from(errno).context(format!("cannot lock {}", path.display()))
            );
        }
    };
    write(&lock, "").with_context(|| format!("cannot write {}", path.display()))?;
    Ok(Some(lock))
}

/// Whether this lock's file is the one at this path, and not removed or replaced.
pub(crate) fn is_at(lock: &File, path: &Path) -> bool {
    let (Ok(ours), Ok(there)) = (lock.metadata(), path.symlink_metadata()) else {
        return false;
    };
    (ours.dev(), ours.ino()) == (there.dev(), there.ino())
}

/// Takes a lock that came with a descriptor which has it: it belongs to that, whoever holds it.
pub(crate) fn again(descriptor: OwnedFd) -> anyhow::Result<Flock<File>> {
    Flock::lock(File::from(descriptor), FlockArg::LockExclusiveNonblock)
        .map_err(|(_, errno)| errno.into())
}

/// Writes the owner, and more lines after it.
pub(crate) fn write(lock: &File, more: &str) -> io::Result<()> {
    let text = format!("{}\n{VERSION}\n{more}", std::process::id());
    lock.write_all_at(text.as_bytes(), 0)?;
    lock.set_len(u64::try_from(text.len()).unwrap_or(0))
}

/// What a lock file says, if somebody has locked it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) pid: i32,
    pub(crate) version: String,
    /// Lines after these.
    pub(crate) more: Vec<String>,
}

/// Who has this lock.
pub(crate) fn owner(path: &Path) -> anyhow::Result<Option<Owner>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.with_context(|| format!("cannot read {}", path.display()))?,
    };
    // Not for long: who wants to take it looks again.
    if Flock::lock(file, FlockArg::LockSharedNonblock).is_ok() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(path)?;
    let mut lines = text.lines().map(str::to_owned);
    let pid = lines.next().and_then(|pid| pid.parse().ok());
    Ok(pid.map(|pid| Owner {
        pid,
        version: lines.next().unwrap_or_default(),
        more: lines.collect(),
    }))
}

//! The lock files of a state directory: one for its daemon (`lock`), one for its keeper
//! (`keeper.lock`). Owns their format: the pid and the version of the process that has the lock,
//! one a line, and lines that the process adds. The text of a file that is not locked means
//! nothing.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use embedshim_core::process::Process;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tracing::warn;

use super::file_id::FileId;

/// The version that a process writes into its lock file.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The path of the daemon's lock file.
pub(crate) fn daemon_path(state_dir: &Path) -> PathBuf {
    state_dir.join("lock")
}

/// The path of the keeper's lock file.
pub(crate) fn keeper_path(state_dir: &Path) -> PathBuf {
    state_dir.join("keeper.lock")
}

/// Makes the state directory and takes one of its locks; `None` if another process has the lock.
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
    write_owner(&lock, "").with_context(|| format!("cannot write {}", path.display()))?;
    Ok(Some(lock))
}

/// Whether the process that took this lock is gone, so that what holds it is a child of that one,
/// which ends with it or becomes another program in a moment.
pub(crate) fn is_owner_gone(path: &Path) -> anyhow::Result<bool> {
    let owner = read_owner(path)?;
    let is_gone =
        |pid| Process::open(pid).map_or(true, |process| process.has_ended().unwrap_or(true));
    Ok(owner.is_some_and(|owner| is_gone(owner.pid)))
}

/// Takes the daemon's lock from a process that was killed and is held up in its end: by a lock file
/// in the place of the one that it has. `None` if another process has that lock as well, a child of
/// it that is not another program yet (invariant 18).
pub(crate) fn take_from_killed(
    state_dir: &Path,
    path: &Path,
) -> anyhow::Result<Option<Flock<File>>> {
    let Some(owner) = read_owner(path)? else {
        return take(state_dir, path);
    };
    let process = Process::open(owner.pid);
    if !process.is_ok_and(|process| process.is_held_up_in_its_end()) || is_open(path, owner.pid)? {
        return Ok(None);
    }
    let new = path.with_extension("new");
    let Some(lock) = take(state_dir, &new)? else {
        return Ok(None);
    };
    std::fs::rename(&new, path).with_context(|| format!("cannot replace {}", path.display()))?;
    warn!(
        pid = owner.pid,
        "state directory: the former embedshimd was killed and is held up by a file system that \
         does not answer: taking its place"
    );
    Ok(Some(lock))
}

/// Whether a process has the file at this path open, but for this process and `killed`. Only what
/// the kernel says of descriptors is read: their files could be those that do not answer.
fn is_open(path: &Path, killed: i32) -> anyhow::Result<bool> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let name = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let entries = std::fs::read_dir("/proc")?.flatten();
    let others = entries.filter(|entry| {
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        pid.is_some_and(|pid: i32| pid != own && pid != killed)
    });
    let mut descriptors = others
        .filter_map(|process| std::fs::read_dir(process.path().join("fd")).ok())
        .flat_map(Iterator::flatten);
    Ok(descriptors.any(|entry| std::fs::read_link(entry.path()).is_ok_and(|link| link == name)))
}

/// Whether the file of this lock is at this path, that is, was not removed or replaced.
pub(crate) fn is_at(lock: &File, path: &Path) -> bool {
    let own = FileId::of_descriptor(lock.as_fd());
    own.is_some() && own == FileId::at(path)
}

/// The lock that an inherited descriptor already has: a lock belongs to the open file, which
/// outlives `execve`.
pub(crate) fn from_inherited(descriptor: OwnedFd) -> anyhow::Result<Flock<File>> {
    Flock::lock(File::from(descriptor), FlockArg::LockExclusiveNonblock)
        .map_err(|(_, errno)| errno.into())
}

/// Writes pid and version of this process into its lock file, and `more` lines after them.
pub(crate) fn write_owner(lock: &File, more: &str) -> io::Result<()> {
    let text = format!("{}\n{VERSION}\n{more}", std::process::id());
    lock.write_all_at(text.as_bytes(), 0)?;
    lock.set_len(u64::try_from(text.len()).unwrap_or(0))
}

/// The process that has a lock, as it says in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) pid: i32,
    pub(crate) version: String,
    /// The lines after pid and version.
    pub(crate) more: Vec<String>,
}

/// Reads which process has the lock at this path; `None` if it is not locked.
pub(crate) fn read_owner(path: &Path) -> anyhow::Result<Option<Owner>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.with_context(|| format!("cannot read {}", path.display()))?,
    };
    // A shared lock for an instant: a process that wants the exclusive lock then tries again.
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

//! The limit of open files (`RLIMIT_NOFILE`) of this process: raising it, and how much of it is
//! used.

use std::io;
use std::os::unix::fs::MetadataExt;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit to the hard limit, and returns that.
pub(crate) fn raise_open_files() -> io::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

/// The soft limit as it is; 0 if it cannot be read.
pub(crate) fn max_open_files() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft)
}

/// How many files this process has open, and how many it may have.
pub(crate) fn open_files() -> Option<(u64, u64)> {
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    // Linux 6.2 and newer give the number as the size of the directory.
    let open = match std::fs::metadata("/proc/self/fd").ok()?.size() {
        0 => std::fs::read_dir("/proc/self/fd").ok()?.count() as u64,
        open => open,
    };
    Some((open, limit))
}

//! Where the hierarchies of cgroups are mounted. Owns that the kernel's list of mounts is not read
//! for each container: it has a line for each container of the node, and its mounts of cgroups are
//! those of the machine's start.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::mountinfo::{MountPoint, read_mountinfo};

static KNOWN: Mutex<Option<Arc<[MountPoint]>>> = Mutex::new(None);

/// The mounts of cgroup file systems, the oldest first, as they were when they were read last.
pub(super) fn known() -> io::Result<Arc<[MountPoint]>> {
    let known = lock().clone();
    known.map_or_else(read, Ok)
}

/// The same, as they are now.
pub(super) fn read() -> io::Result<Arc<[MountPoint]>> {
    let mut mounts = read_mountinfo()?;
    mounts.retain(|mount| mount.kind.starts_with("cgroup"));
    let mounts: Arc<[MountPoint]> = mounts.into();
    *lock() = Some(Arc::clone(&mounts));
    Ok(mounts)
}

fn lock() -> MutexGuard<'static, Option<Arc<[MountPoint]>>> {
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

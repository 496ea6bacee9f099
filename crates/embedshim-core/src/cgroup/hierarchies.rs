//! Where the hierarchies of cgroups are mounted. Owns that the kernel's list of mounts is not read
//! for each container: it has a line for each container of the node, and its mounts of cgroups are
//! those of the machine's start. Tells of none that is for a while only.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::mountinfo::{MountPoint, read_mountinfo};

static KNOWN: Mutex<Option<Arc<[MountPoint]>>> = Mutex::new(None);

/// The mounts of cgroup file systems, the oldest first and one of each, as they were when they were
/// read last.
pub(super) fn known() -> io::Result<Arc<[MountPoint]>> {
    let known = lock().clone();
    known.map_or_else(read, Ok)
}

/// The same, as they are now.
pub(super) fn read() -> io::Result<Arc<[MountPoint]>> {
    let mut mounts = read_mountinfo()?;
    mounts.retain(|mount| mount.kind.starts_with("cgroup"));
    let mounts = oldest_of_each(mounts);
    let mounts: Arc<[MountPoint]> = mounts.into();
    *lock() = Some(Arc::clone(&mounts));
    Ok(mounts)
}

/// While CRIU restores a container, it mounts all hierarchies in that container's bundle, for
/// everyone to see. What is made there afterwards is made in the bundle. The oldest mount of a
/// hierarchy is the machine's.
fn oldest_of_each(mounts: Vec<MountPoint>) -> Vec<MountPoint> {
    let mut oldest: Vec<MountPoint> = Vec::new();
    for mount in mounts {
        // A hierarchy's own options are the same at all of its mounts, and no other's.
        let is_of_same = |other: &MountPoint| {
            (&other.kind, &other.root, &other.options) == (&mount.kind, &mount.root, &mount.options)
        };
        if !oldest.iter().any(is_of_same) {
            oldest.push(mount);
        }
    }
    oldest
}

fn lock() -> MutexGuard<'static, Option<Arc<[MountPoint]>>> {
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_that_criu_has_made_for_a_while_is_none() {
        let mount = |kind: &str, root: &str, path: &str, option: &str| MountPoint {
            root: root.into(),
            path: path.into(),
            kind: kind.to_owned(),
            options: vec!["rw".to_owned(), option.to_owned()],
        };
        let machine = [
            mount("cgroup", "/", "/c/memory", "memory"),
            mount("cgroup", "/", "/c/systemd", "name=systemd"),
            mount("cgroup2", "/", "/c/unified", "nsdelegate"),
            // A part of a hierarchy, which is all that a container sees.
            mount("cgroup", "/part", "/d/memory", "memory"),
        ];
        let criu = [
            mount("cgroup", "/", "/b/memory", "memory"),
            mount("cgroup", "/", "/b/systemd", "name=systemd"),
            mount("cgroup2", "/", "/b/unified", "nsdelegate"),
        ];
        let now = [machine.clone().as_slice(), &criu].concat();
        assert_eq!(oldest_of_each(now), machine);
    }
}

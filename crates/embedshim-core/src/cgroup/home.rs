//! A cgroup of its own for a process that embedshim keeps for a pod, below the pod's: so it is no
//! process of the daemon's service, and what it uses is the pod's. Owns that cgroup's making and
//! where it is; [`Cgroup::remove_left`](super::Cgroup::remove_left) removes it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tracing::debug;

use super::{below, hierarchies};
use crate::mountinfo::MountPoint;

/// As little as the kernel takes, on v1 and on v2: such a process only waits.
const SHARES: [(&str, &str); 2] = [("cpu.shares", "2"), ("cpu.weight", "1")];
/// A new cgroup of this v1 controller takes no process before it has processors and memory.
const NEEDS_SETTINGS: &str = "cpuset";

/// Where a cgroup called `name` is below the parent that the CRI names: a path, or a slice of
/// systemd's, `a-b.slice` for `a.slice/a-b.slice`.
pub(crate) fn path(parent: &str, name: &str) -> PathBuf {
    let mut path = PathBuf::from("/");
    match parent
        .strip_suffix(".slice")
        .filter(|_| !parent.contains('/'))
    {
        Some(slice) => {
            let ends = slice.match_indices('-').map(|(at, _)| at);
            for end in ends.chain([slice.len()]) {
                let upper = slice.get(..end).unwrap_or_default();
                path.push(format!("{upper}.slice"));
            }
        }
        None => path.push(parent.trim_start_matches('/')),
    }
    path.join(name)
}

/// Makes the cgroup in each hierarchy, and moves the process there. Where that cannot be, the
/// process stays where it is. Parents are made as the OCI runtime does, and stay. Blocks.
pub(crate) fn settle(path: &Path, pid: i32) {
    let mounts = match hierarchies::known() {
        Ok(mounts) => mounts,
        Err(error) => {
            debug!(pid, %error, "no cgroups are known");
            return;
        }
    };
    for mount in mounts.iter() {
        if mount.options.iter().any(|option| option == NEEDS_SETTINGS) {
            continue;
        }
        if let Err(error) = settle_at(mount, path, pid) {
            debug!(pid, at = %mount.path.display(), %error, "the process stays in its cgroup");
        }
    }
}

fn settle_at(mount: &MountPoint, path: &Path, pid: i32) -> io::Result<()> {
    let Some(directory) = below(mount, path) else {
        return Ok(());
    };
    fs::create_dir_all(&directory)?;
    for (file, value) in SHARES {
        // The controller is on or not.
        let file = directory.join(file);
        if file.exists() {
            let _ = fs::write(file, value);
        }
    }
    fs::write(directory.join("cgroup.procs"), pid.to_string()).inspect_err(|_| {
        let _ = fs::remove_dir(&directory);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_a_path_or_a_slice() {
        let paths = [
            ("/kubepods/pod1", "/kubepods/pod1/x"),
            (
                "kubepods-besteffort-pod1.slice",
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/x",
            ),
            ("", "/x"),
            ("/a.slice", "/a.slice/x"),
        ];
        for (parent, expected) in paths {
            assert_eq!(path(parent, "x"), Path::new(expected), "{parent}");
        }
    }
}

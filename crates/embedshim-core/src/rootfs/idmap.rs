//! Idmapped mounts (`uidmap=`, `gidmap=`; containerd 2.0+, Linux 5.12): files of a snapshot that
//! many pods share appear to belong to the users of one pod. Never changes a file's owner on disk.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::lowerdirs::{self, LOWERDIR};
use crate::{sys, user_namespace};

/// Which ids on disk appear as which.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct IdMap {
    users: String,
    groups: String,
}

impl IdMap {
    /// From containerd's `container:host:size[,...]`, once for users and once for groups.
    pub(super) fn parse(users: &str, groups: &str) -> Option<Self> {
        Some(Self {
            users: lines(users)?,
            groups: lines(groups)?,
        })
    }

    /// A user namespace with this mapping; it lives as long as the descriptor or a mount that uses
    /// it.
    fn user_namespace(&self) -> io::Result<OwnedFd> {
        user_namespace::make(&self.users, &self.groups)
    }
}

/// The lines of `/proc/PID/uid_map`.
fn lines(ranges: &str) -> Option<String> {
    ranges.split(',').map(line).collect()
}

fn line(range: &str) -> Option<String> {
    let numbers = range.split(':').map(|number| number.parse().ok());
    let numbers: Vec<u32> = numbers.collect::<Option<_>>()?;
    let [inside, outside, size] = numbers.as_slice() else {
        return None;
    };
    Some(format!("{inside} {outside} {size}\n"))
}

/// A detached mount, to be attached with [`attach`].
pub(super) type Detached = OwnedFd;

/// What is at `source`, with other owners.
pub(super) fn bind(source: &Path, recursive: bool, map: &IdMap) -> io::Result<Detached> {
    let namespace = map.user_namespace()?;
    clone_mapped(source, recursive, &namespace)
}

fn clone_mapped(source: &Path, recursive: bool, namespace: &OwnedFd) -> io::Result<Detached> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    let tree = open_tree(CWD, source, flags)?;
    sys::map_owners(tree.as_fd(), namespace.as_fd())?;
    Ok(tree)
}

/// Attaches a detached mount.
pub(super) fn attach(detached: &Detached, target: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    Ok(move_mount(detached, "", CWD, target, flags)?)
}

/// An overlay whose lower directories have other owners. Its layers are mounted in a mount
/// namespace that ends with this call, so that no copy of a snapshot is left in the file system,
/// whatever happens; `stage` is a directory to mount them on there.
pub(super) fn overlay(
    flags: MsFlags,
    data: &str,
    map: &IdMap,
    stage: &Path,
) -> io::Result<Detached> {
    let user_namespace = map.user_namespace()?;
    let (lower, rest) = lowerdirs::split(data).ok_or(Errno::EINVAL)?;
    lowerdirs::on_own_thread(|| {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
        let layers = lower
            .iter()
            .map(|layer| clone_mapped(layer, false, &user_namespace))
            .collect::<io::Result<Vec<Detached>>>()?;
        let none = MsFlags::empty();
        mount(Some("tmpfs"), stage, Some("tmpfs"), none, Some("mode=700"))?;
        nix::unistd::chdir(stage)?;
        let mut names = Vec::new();
        for (number, layer) in layers.iter().enumerate() {
            let name = number.to_string();
            fs::create_dir(&name)?;
            attach(layer, Path::new(&name))?;
            names.push(name);
        }
        fs::create_dir("merged")?;
        let lower = format!("{LOWERDIR}{}", names.join(":"));
        let data = [&[lower.as_str()], rest.as_slice()].concat().join(",");
        let overlay = Some("overlay");
        mount(overlay, "merged", overlay, flags, Some(data.as_str()))?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        Ok(open_tree(CWD, "merged", flags)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_lines_of_the_kernels() {
        let map = IdMap::parse("0:1000:1,1:100001:65535", "0:100000:65536").unwrap();
        assert_eq!(map.users, "0 1000 1\n1 100001 65535\n");
        assert_eq!(map.groups, "0 100000 65536\n");
        for wrong in [
            "",
            "0",
            "0:1",
            "0:1:2:3",
            "a:b:c",
            "0:1:-1",
            "0:1:4294967296",
            "0:1:2,",
        ] {
            assert_eq!(IdMap::parse(wrong, "0:0:1"), None, "{wrong}");
        }
    }

    #[test]
    fn a_namespace_has_the_mapping_and_outlives_its_first_process() {
        let map = IdMap::parse("0:100000:65536", "0:200000:1").unwrap();
        let namespace = map.user_namespace().unwrap();
        assert!(nix::sys::stat::fstat(&namespace).is_ok());
    }
}

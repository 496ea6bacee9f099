//! [`pinned`]: the pins of all daemons there are or were on this machine. Owns who uses them, as
//! the kernel says; removes nothing.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::MapInfo;

use crate::pins::{Pins, all_dirs, state_dir_of};

/// The pins of one state directory, in one layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pinned {
    /// Where they are: to be removed by [`remove_pins`](crate::remove_pins).
    pub pin_dir: PathBuf,
    /// Whose they are; `None` if an older version has pinned them and their name does not tell it.
    pub state_dir: Option<PathBuf>,
}

impl Pinned {
    /// Whether no process uses them and the state directory is gone: nothing will ever read what
    /// they record. Blocks on that path's file system, and on procfs.
    #[must_use]
    pub fn is_left(&self) -> bool {
        let is_gone = |path: &PathBuf| {
            let found = fs::symlink_metadata(path);
            found.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        };
        self.state_dir.as_ref().is_some_and(is_gone)
            && self.users().is_ok_and(|users| users.is_empty())
    }

    /// The processes that have a map of theirs open, daemons that is; those that the mounted procfs
    /// shows. Blocks on procfs.
    ///
    /// # Errors
    /// A map or a process cannot be asked, as without root's capabilities: then it is not known
    /// whether they are used.
    pub fn users(&self) -> io::Result<Vec<i32>> {
        let pins = Pins::new(&self.pin_dir);
        let mut ids = HashSet::new();
        for map in [pins.tracked(), pins.exited()] {
            match MapInfo::from_pin(&map) {
                Ok(info) => drop(ids.insert(info.id())),
                Err(_) if !map.exists() => {}
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        let mut users = Vec::new();
        for process in fs::read_dir("/proc")? {
            let name = process?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            if has_open(pid, &ids)? {
                users.push(pid);
            }
        }
        users.sort_unstable();
        Ok(users)
    }
}

/// All pins below bpffs, by path. Needs root.
///
/// # Errors
/// bpffs cannot be read. Without any pins there is no error.
pub fn pinned() -> io::Result<Vec<Pinned>> {
    let mut found = Vec::new();
    for directory in folders(&all_dirs())? {
        let state_dir = state_dir_of(&directory);
        for pin_dir in folders(&directory)? {
            found.push(Pinned {
                pin_dir,
                state_dir: state_dir.clone(),
            });
        }
    }
    found.sort_by(|one, other| one.pin_dir.cmp(&other.pin_dir));
    Ok(found)
}

fn folders(path: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut folders = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            folders.push(entry.path());
        }
    }
    Ok(folders)
}

/// Whether a process has one of these maps open. One that ends meanwhile has none.
fn has_open(pid: i32, maps: &HashSet<u32>) -> io::Result<bool> {
    let descriptors = match fs::read_dir(format!("/proc/{pid}/fd")) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(error),
        descriptors => descriptors.into_iter().flatten().flatten(),
    };
    let info_of = Path::new("/proc").join(pid.to_string()).join("fdinfo");
    let is_one = |descriptor: fs::DirEntry| {
        let is_map = fs::read_link(descriptor.path())
            .is_ok_and(|target| target.as_os_str() == "anon_inode:bpf-map");
        let info = || fs::read_to_string(info_of.join(descriptor.file_name()));
        is_map && info().is_ok_and(|info| map_id(&info).is_some_and(|id| maps.contains(&id)))
    };
    Ok(descriptors.into_iter().any(is_one))
}

/// What `fdinfo` says of a map.
fn map_id(info: &str) -> Option<u32> {
    let line = info.lines().find_map(|line| line.strip_prefix("map_id:"))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_a_map_is_read() {
        let info = "pos:\t0\nflags:\t02000002\nmap_type:\t1\nmap_id:\t37\nfrozen:\t0\n";
        assert_eq!(map_id(info), Some(37));
        assert_eq!(map_id("pos:\t0\n"), None);
    }
}

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
        self.state_dir.as_ref().is_some_and(is_gone) && self.users().is_empty()
    }

    /// The processes that have a map of theirs open, daemons that is, in any namespace. Needs root,
    /// or the answer lacks those of others. Blocks on procfs.
    #[must_use]
    pub fn users(&self) -> Vec<i32> {
        let pins = Pins::new(&self.pin_dir);
        let maps = [pins.tracked(), pins.exited()];
        let ids: HashSet<u32> = maps
            .into_iter()
            .filter_map(|map| MapInfo::from_pin(map).ok())
            .map(|info| info.id())
            .collect();
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let mut users: Vec<i32> = processes
            .filter_map(|process| process.file_name().to_str()?.parse().ok())
            .filter(|&pid| has_open(pid, &ids))
            .collect();
        users.sort_unstable();
        users
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

/// Whether a process has one of these maps open.
fn has_open(pid: i32, maps: &HashSet<u32>) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd"));
    descriptors
        .into_iter()
        .flatten()
        .flatten()
        .any(|descriptor| {
            let is_map = fs::read_link(descriptor.path())
                .is_ok_and(|target| target.as_os_str() == "anon_inode:bpf-map");
            let number = descriptor.file_name();
            let info =
                || fs::read_to_string(Path::new(&format!("/proc/{pid}/fdinfo")).join(number));
            is_map && info().is_ok_and(|info| map_id(&info).is_some_and(|id| maps.contains(&id)))
        })
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

//! Where program and maps are pinned, and what is found there.
//! Owns the names below bpffs; one directory per state directory, so that daemons don't meet.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{FsType, statfs};

use crate::clocks::Offsets;
use crate::object::{OBJECT, PROGRAMS, own_pid_namespace};

/// Where bpffs is expected.
const BPFFS: &str = "/sys/fs/bpf";
/// `BPF_FS_MAGIC` of linux/magic.h.
const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);
/// What the names of links begin with.
const LINK: &str = "link-";
/// Which layout of the maps is below: another one gets another directory, and the two can exist
/// side by side.
const LAYOUT: &str = "v1";
/// The symbolic link, beside the layouts, to the state directory that they are of.
const STATE_DIR: &str = "state-dir";

/// The pin directory of the daemon with this state directory:
/// `/sys/fs/bpf/embedshim/run-embedshim/v1` for `/run/embedshim`. bpffs allows no dots, so other
/// characters are replaced and a hash of the path tells them apart.
pub fn pin_dir_for(state_dir: &Path) -> PathBuf {
    let path = state_dir.as_os_str().as_bytes();
    let path = path.strip_prefix(b"/").unwrap_or(path);
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let mut name: Vec<u8> = path
        .iter()
        .map(|&byte| if is_plain(byte) { byte } else { b'-' })
        .collect();
    if path.iter().any(|&byte| !is_plain(byte) && byte != b'/') || name.len() > 200 {
        name.truncate(200);
        name.extend_from_slice(format!("-{:016x}", fnv1a(path)).as_bytes());
    }
    all_dirs().join(OsStr::from_bytes(&name)).join(LAYOUT)
}

/// Where the directories of all state directories are.
pub(crate) fn all_dirs() -> PathBuf {
    Path::new(BPFFS).join("embedshim")
}

/// Notes whose pins these are, which the name of their directory does not always tell; for
/// [`pinned`](crate::pinned).
///
/// # Errors
/// What the kernel says: bpffs knows symbolic links since Linux 4.4.
pub fn note_state_dir(pin_dir: &Path, state_dir: &Path) -> io::Result<()> {
    let link = link_of(pin_dir);
    if fs::read_link(&link).is_ok_and(|noted| noted == state_dir) {
        return Ok(());
    }
    let _ = fs::remove_file(&link);
    std::os::unix::fs::symlink(state_dir, link)
}

/// The state directory that the pins in this directory, one below [`all_dirs`], are of. Older
/// versions did not note it: then the name tells it, unless it has a hash.
pub(crate) fn state_dir_of(directory: &Path) -> Option<PathBuf> {
    if let Ok(noted) = fs::read_link(directory.join(STATE_DIR)) {
        return Some(noted);
    }
    let name = directory.file_name()?.to_str()?;
    let is_hash = |end: &str| end.len() == 16 && end.bytes().all(|byte| byte.is_ascii_hexdigit());
    if name.rsplit('-').next().is_some_and(is_hash) {
        return None;
    }
    let state_dir = Path::new("/").join(name.replace('-', "/"));
    (pin_dir_for(&state_dir).parent() == Some(directory)).then_some(state_dir)
}

fn link_of(pin_dir: &Path) -> PathBuf {
    pin_dir.parent().unwrap_or(pin_dir).join(STATE_DIR)
}

/// Ends the recording and removes what is pinned, with all records that were not read. For a
/// program that will not come back: a monitor that is dropped leaves its pins to a successor. What
/// is not there is removed already.
pub fn remove_pins(pin_dir: &Path) -> io::Result<()> {
    let gone = |result: io::Result<()>| match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    Pins::new(pin_dir).remove()?;
    gone(fs::remove_dir(pin_dir))?;
    // The state directory's, which other layouts have, too.
    let is_layout =
        |entry: io::Result<fs::DirEntry>| entry.is_ok_and(|entry| entry.file_name() != STATE_DIR);
    let parent = pin_dir.parent().map(fs::read_dir);
    if let Some(Ok(mut entries)) = parent
        && !entries.any(is_layout)
    {
        gone(fs::remove_file(link_of(pin_dir)))?;
    }
    match pin_dir.parent().map(fs::remove_dir) {
        Some(Err(error)) if error.kind() != io::ErrorKind::DirectoryNotEmpty => gone(Err(error)),
        _ => Ok(()),
    }
}

/// FNV-1a, to tell paths apart that look the same once escaped.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The pins of one daemon.
#[derive(Clone, Debug)]
pub(crate) struct Pins {
    directory: PathBuf,
}

impl Pins {
    pub(crate) fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
        }
    }

    /// Makes the directory, for us alone.
    pub(crate) fn make(&self) -> io::Result<()> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn tracked(&self) -> PathBuf {
        self.directory.join("tracked")
    }

    pub(crate) fn exited(&self) -> PathBuf {
        self.directory.join("exited")
    }

    /// Of this very program's copies: another version, or one for another pid or time namespace,
    /// has other names, so that both can be there while one replaces the other.
    pub(crate) fn links(&self) -> Vec<PathBuf> {
        let version = fnv1a(OBJECT) ^ u64::from(own_pid_namespace());
        let version = version ^ Offsets::own().boot().rotate_left(32);
        let name = |copy| format!("{LINK}{version:016x}-{copy}");
        (1..=PROGRAMS.len())
            .map(|copy| self.directory.join(name(copy)))
            .collect()
    }

    /// Of other versions.
    pub(crate) fn other_links(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .flatten();
        let links = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(LINK));
        let own = self.links();
        links
            .map(|entry| entry.path())
            .filter(|path| !own.contains(path))
            .collect()
    }

    /// Removes all of it; the kernel stops recording.
    pub(crate) fn remove(&self) -> io::Result<()> {
        let links = self.links().into_iter().chain(self.other_links());
        for path in links.chain([self.tracked(), self.exited()]) {
            match fs::remove_file(path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether the directory is, or would be, on a bpffs; else the nearest directory that exists
    /// and is not.
    pub(crate) fn on_bpffs(&self) -> Result<(), PathBuf> {
        let existing = self
            .directory
            .ancestors()
            .find(|path| path.exists())
            .unwrap_or(Path::new("/"));
        match statfs(existing) {
            Ok(found) if found.filesystem_type() == BPF_FS_MAGIC => Ok(()),
            _ => Err(existing.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_directory_is_told_by_the_name_unless_that_has_a_hash() {
        for (state_dir, is_told) in [
            ("/run/embedshim", true),
            ("/tmp/embedshim_x/es", true),
            ("/run/my-embedshim", false),
            ("/run/embed.shim", false),
        ] {
            let state_dir = Path::new(state_dir);
            let pin_dir = pin_dir_for(state_dir);
            let told = state_dir_of(pin_dir.parent().unwrap());
            assert_eq!(told.as_deref(), is_told.then_some(state_dir));
        }
    }

    #[test]
    fn every_state_directory_has_pins_of_its_own() {
        let of = |path: &str| pin_dir_for(Path::new(path)).display().to_string();
        assert_eq!(
            of("/run/embedshim"),
            "/sys/fs/bpf/embedshim/run-embedshim/v1"
        );
        let (dot, dash) = (of("/tmp/.x"), of("/tmp/-x"));
        assert_ne!(dot, dash);
        assert!(!dot.contains('.'), "{dot}");
        assert!(
            of(&"/long".repeat(100))
                .split('/')
                .all(|part| part.len() < 256)
        );
    }
}

//! [`FileId`]: which file something is, whatever path leads to it. Two files that exist at the same
//! time have different ids; a file that took another one's place at a path has its own.

use std::fs::Metadata;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::stat::fstat;

/// The device and the inode of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
}

impl From<&Metadata> for FileId {
    fn from(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

impl FileId {
    /// The id of what is at this path, which may be a symbolic link. `None` if nothing is there.
    pub(crate) fn at(path: &Path) -> Option<Self> {
        Some((&path.symlink_metadata().ok()?).into())
    }

    /// The id of the file that this path leads to, over symbolic links. `None` if there is none.
    pub(crate) fn behind(path: &Path) -> Option<Self> {
        Some((&path.metadata().ok()?).into())
    }

    /// The id of an open file, socket or pipe.
    pub(crate) fn of_descriptor(descriptor: BorrowedFd<'_>) -> Option<Self> {
        let stat = fstat(descriptor).ok()?;
        Some(Self {
            device: stat.st_dev,
            inode: stat.st_ino,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_file_that_took_the_place_of_another_is_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let old = File::create(&path).unwrap();
        let id = FileId::of_descriptor(old.as_fd());
        assert!(id.is_some());
        assert_eq!(id, FileId::at(&path));
        let other = directory.path().join("other");
        File::create(&other).unwrap();
        fs::rename(&other, &path).unwrap();
        assert_ne!(id, FileId::at(&path));
        assert_ne!(None, FileId::at(&path));
        fs::remove_file(&path).unwrap();
        assert_eq!(None, FileId::at(&path));
    }

    #[test]
    fn a_symbolic_link_is_another_file_than_its_target() {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(directory.path(), &link).unwrap();
        assert_eq!(FileId::behind(&link), FileId::at(directory.path()));
        assert_ne!(FileId::at(&link), FileId::at(directory.path()));
    }
}

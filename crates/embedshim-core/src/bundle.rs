//! A bundle directory, and which one of its name it is. Owns that two directories of one path are
//! told apart (invariant 11).

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Which directory a bundle is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BundleId {
    /// The file system's device number.
    pub device: u64,
    /// The directory's number there.
    pub inode: u64,
}

impl BundleId {
    /// Of the directory at `path`. Blocks on the file system.
    pub fn of(path: &Path) -> io::Result<Self> {
        Bundle::open(path).map(|bundle| bundle.id())
    }
}

/// A bundle directory, and which one of that name: the same id can get a new bundle of the same
/// path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Bundle {
    pub(crate) path: PathBuf,
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

impl Bundle {
    /// The bundle at `path`. Blocks on the file system.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        if !metadata.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(Self {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }

    pub(crate) fn id(&self) -> BundleId {
        BundleId {
            device: self.device,
            inode: self.inode,
        }
    }
}

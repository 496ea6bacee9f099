//! [`BundleNote`]: a small file in the bundle, for what only the launcher knows at `start` (where
//! containerd takes events) and only the daemon knows at `Create` (which OCI runtime), and the
//! other needs later. Synchronous: the launcher has no async runtime.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use embedshim_core::ChildContext;
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

const FILE: &str = "embedshim.json";
/// The most bytes that are read: other programs can write into a bundle, too.
const MAX_BYTES: u64 = 1024 * 1024;
/// More than most have.
const USUAL: usize = 4096;

/// What the launcher and the daemon leave for each other. Fields of later versions are ignored,
/// missing ones are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BundleNote {
    /// The container's namespace.
    pub namespace: String,
    /// containerd's ttrpc socket, to which events are forwarded.
    pub events: String,
    /// The OCI runtime's binary; empty for runc.
    pub runtime: String,
    /// `--root` of the OCI runtime, with the namespace; empty for the default.
    pub runtime_root: String,
    /// The sandbox of the container, if this daemon is its controller; empty otherwise. No launcher
    /// was executed for such a container.
    pub sandbox: String,
    /// What containerd would pass on to a shim: environment, limits, umask and OOM score.
    pub context: ChildContext,
}

impl BundleNote {
    /// Reads the note of a bundle; `None` if it has none.
    pub fn read(bundle: &Path) -> io::Result<Option<Self>> {
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let file = match OpenOptions::new()
            .read(true)
            .custom_flags(flags.bits())
            .open(bundle.join(FILE))
        {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let mut text = Vec::with_capacity(USUAL);
        file.take(MAX_BYTES).read_to_end(&mut text)?;
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(io::Error::from)
    }

    /// Writes it, as a whole or not at all.
    pub fn write(&self, bundle: &Path) -> io::Result<()> {
        write_atomically(bundle, FILE, &serde_json::to_vec(self)?)
    }
}

/// Replaces `directory/name` by a file with these bytes, in one step.
pub(crate) fn write_atomically(directory: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = directory.join(format!(".{name}.{}", std::process::id()));
    let write = || {
        let mut file: File = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(bytes)?;
        std::fs::rename(&temporary, directory.join(name))
    };
    // A killed process of the same pid may have left one.
    let _ = std::fs::remove_file(&temporary);
    write().inspect_err(|_| {
        let _ = std::fs::remove_file(&temporary);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_comes_back_and_a_bad_one_is_an_error() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(BundleNote::read(bundle.path()).unwrap(), None);
        let note = BundleNote {
            events: "/run/c.ttrpc".into(),
            ..BundleNote::default()
        };
        note.write(bundle.path()).unwrap();
        assert_eq!(BundleNote::read(bundle.path()).unwrap(), Some(note));
        std::fs::write(bundle.path().join(FILE), "{").unwrap();
        assert!(BundleNote::read(bundle.path()).is_err());
        std::fs::remove_file(bundle.path().join(FILE)).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", bundle.path().join(FILE)).unwrap();
        assert!(BundleNote::read(bundle.path()).is_err());
    }
}

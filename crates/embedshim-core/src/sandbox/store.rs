//! [`Store`]: one small JSON document per sandbox in the state directory, replaced atomically. Owns
//! the files; the format is [`record`](super::record)'s.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use tracing::warn;

use crate::failpoint;
use crate::id::SandboxKey;
use crate::sandbox::error::{SandboxError, failed};
use crate::sandbox::record::{SandboxRecord, VERSION};

/// Directory of the records below the state directory.
const RECORDS: &str = "sandboxes";
/// Where unreadable records go, as those of tasks do.
const UNREADABLE: &str = "unreadable";
const SUFFIX: &str = ".json";

/// The directory of the records.
#[derive(Clone, Debug)]
pub(super) struct Store {
    records: PathBuf,
    unreadable: PathBuf,
}

impl Store {
    /// Opens (and makes) the store below `state_dir`. Blocks on the file system.
    pub(super) fn open(state_dir: &Path) -> Result<Self, SandboxError> {
        let store = Self {
            records: state_dir.join(RECORDS),
            unreadable: state_dir.join(UNREADABLE),
        };
        store.make()?;
        Ok(store)
    }

    /// Makes the directory. Blocks on the file system.
    pub(super) fn make(&self) -> Result<(), SandboxError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.records)
            .map_err(|source| SandboxError::Records {
                doing: "cannot create the directory of sandbox records",
                path: self.records.clone(),
                source,
            })
    }

    /// Replaces the record: after a crash there is the old one or the new one. Without fsync, as
    /// the namespaces that it speaks of are gone after a power cut. Blocks on the file system.
    pub(super) fn save(&self, record: &SandboxRecord) -> Result<(), SandboxError> {
        let path = self.path(&record.key);
        let SandboxKey { namespace, id } = &record.key;
        // No id begins with a dot: no record has this name.
        let draft = self.records.join(format!(".{namespace}:{id}.draft"));
        let write = || -> io::Result<()> {
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&draft)?;
            file.write_all(&serde_json::to_vec(record)?)?;
            fs::rename(&draft, &path)
        };
        failpoint::step("before a sandbox's record is written");
        let written = write();
        failpoint::step("after a sandbox's record was written");
        written.map_err(|source: io::Error| {
            let _ = fs::remove_file(&draft);
            failed(&record.key, "cannot write the record", &path)(source)
        })
    }

    /// Removes the record, if there is one. Blocks on the file system.
    pub(super) fn remove(&self, key: &SandboxKey) -> Result<(), SandboxError> {
        let path = self.path(key);
        failpoint::step("before a sandbox's record is removed");
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(failed(key, "cannot remove the record", &path)(source))
            }
            _ => Ok(()),
        }
    }

    /// All records. What cannot be read is logged and moved aside: one bad file must not keep the
    /// daemon from its other sandboxes. Blocks on the file system.
    pub(super) fn load(&self) -> Result<Vec<SandboxRecord>, SandboxError> {
        let failed = |source| SandboxError::Records {
            doing: "cannot list the sandbox records",
            path: self.records.clone(),
            source,
        };
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.records).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with('.') {
                let _ = fs::remove_file(&path);
            } else if name.ends_with(SUFFIX) {
                match self.read(&path) {
                    Ok(record) => records.push(record),
                    Err(reason) => self.set_aside(&path, &reason),
                }
            }
        }
        Ok(records)
    }

    fn read(&self, path: &Path) -> Result<SandboxRecord, String> {
        let text = fs::read(path).map_err(|e| e.to_string())?;
        let record: SandboxRecord = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
        if record.version > VERSION {
            return Err(format!(
                "it is of version {}, this program knows {VERSION}",
                record.version
            ));
        }
        if self.path(&record.key) != path {
            return Err(format!("it speaks of {}", record.key));
        }
        Ok(record)
    }

    fn set_aside(&self, path: &Path, reason: &str) {
        warn!(path = %path.display(), reason, kept_in = %self.unreadable.display(), "cannot use a sandbox record");
        let moved = fs::create_dir_all(&self.unreadable).and_then(|()| {
            fs::rename(
                path,
                self.unreadable.join(path.file_name().unwrap_or_default()),
            )
        });
        if let Err(source) = moved {
            warn!(path = %path.display(), %source, "cannot move the record aside");
        }
    }

    fn path(&self, key: &SandboxKey) -> PathBuf {
        // Neither part can hold a colon, so no two sandboxes share a name.
        let SandboxKey { namespace, id } = key;
        self.records.join(format!("{namespace}:{id}{SUFFIX}"))
    }
}

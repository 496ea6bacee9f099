//! [`Records`]: one small JSON document a thing in a folder of the state directory, replaced
//! atomically. Owns the files, and what becomes of one that cannot be read; knows no format.

use std::fs;
use std::io::{self, Write};
use std::marker::PhantomData;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tracing::warn;

/// Where unreadable records go, so that they are neither lost nor read again.
const UNREADABLE: &str = "unreadable";
const SUFFIX: &str = ".json";

/// What is recorded of one thing.
pub(crate) trait Record: Serialize + DeserializeOwned {
    /// What it is of, for messages.
    const WHAT: &'static str;
    /// The folder of all such records below the state directory.
    const FOLDER: &'static str;
    /// The format that this program writes. A newer one is not read.
    const VERSION: u32;

    /// The format of this one.
    fn version(&self) -> u32;

    /// The name of its file, without an ending: of this thing alone, and no dot comes first.
    fn name(&self) -> String;
}

/// An operation on the files that has failed.
#[derive(Debug)]
pub(crate) struct RecordError {
    pub(crate) path: PathBuf,
    pub(crate) source: io::Error,
}

/// The records of one kind.
#[derive(Debug)]
pub(crate) struct Records<R> {
    folder: PathBuf,
    unreadable: PathBuf,
    is_in_memory: Arc<AtomicBool>,
    kind: PhantomData<fn() -> R>,
}

impl<R> Clone for Records<R> {
    fn clone(&self) -> Self {
        Self {
            folder: self.folder.clone(),
            unreadable: self.unreadable.clone(),
            is_in_memory: Arc::clone(&self.is_in_memory),
            kind: PhantomData,
        }
    }
}

impl<R: Record> Records<R> {
    /// Those in this state directory. Makes nothing.
    pub(crate) fn at(state_dir: &Path) -> Self {
        Self {
            folder: state_dir.join(R::FOLDER),
            unreadable: state_dir.join(UNREADABLE),
            is_in_memory: Arc::default(),
            kind: PhantomData,
        }
    }

    /// Makes the folder if it is missing. Blocks on the file system.
    pub(crate) fn make(&self) -> Result<(), RecordError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)
            .map_err(failed(&self.folder))?;
        let found = statfs(&self.folder).map(|found| found.filesystem_type());
        self.is_in_memory
            .store(found == Ok(TMPFS_MAGIC), Ordering::Relaxed);
        Ok(())
    }

    /// Whether the folder was on a tmpfs when it was made: no operation on it waits for a device or
    /// another program.
    pub(crate) fn is_in_memory(&self) -> bool {
        self.is_in_memory.load(Ordering::Relaxed)
    }

    /// Replaces a record: after a crash there is the old one or the new one. Blocks on the file
    /// system.
    ///
    /// Without fsync: the state directory is on tmpfs or its content is worthless after a power
    /// cut, since the processes are gone too.
    pub(crate) fn save(&self, record: &R) -> Result<(), RecordError> {
        let name = record.name();
        let path = self.path(&name);
        let draft = self.folder.join(format!(".{name}.draft"));
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
        write().map_err(|source| {
            let _ = fs::remove_file(&draft);
            failed(&path)(source)
        })
    }

    /// Removes the record of this name, if there is one. Blocks on the file system.
    pub(crate) fn remove(&self, name: &str) -> Result<(), RecordError> {
        let path = self.path(name);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(failed(&path)(source)),
            _ => Ok(()),
        }
    }

    /// All records. What cannot be read is logged and moved aside, for a human to look at: one bad
    /// file must not keep the daemon from what else there is. Blocks on the file system.
    pub(crate) fn load(&self) -> Result<Vec<R>, RecordError> {
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(failed(&self.folder))? {
            let path = entry.map_err(failed(&self.folder))?.path();
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

    fn read(&self, path: &Path) -> Result<R, String> {
        let text = fs::read(path).map_err(|error| error.to_string())?;
        let record: R = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
        let (version, known) = (record.version(), R::VERSION);
        if version > known {
            return Err(format!(
                "it is of version {version}, this program knows {known}"
            ));
        }
        let name = record.name();
        if self.path(&name) != path {
            return Err(format!("it speaks of {name}"));
        }
        Ok(record)
    }

    fn set_aside(&self, path: &Path, reason: &str) {
        let kept_in = self.unreadable.display();
        warn!(path = %path.display(), reason, %kept_in, "cannot use a {} record", R::WHAT);
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

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}{SUFFIX}"))
    }
}

fn failed(path: &Path) -> impl Fn(io::Error) -> RecordError {
    let path = path.to_owned();
    move |source| RecordError {
        path: path.clone(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Serialize, Deserialize)]
    struct Note {
        version: u32,
        name: String,
    }

    impl Record for Note {
        const WHAT: &'static str = "note";
        const FOLDER: &'static str = "notes";
        const VERSION: u32 = 1;

        fn version(&self) -> u32 {
            self.version
        }

        fn name(&self) -> String {
            self.name.clone()
        }
    }

    fn note(version: u32, name: &str) -> Note {
        let name = name.to_owned();
        Note { version, name }
    }

    #[test]
    fn a_bad_record_is_set_aside_and_the_others_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::<Note>::at(dir.path());
        records.make().unwrap();
        records.save(&note(1, "good")).unwrap();
        records.save(&note(2, "future")).unwrap();
        let file = |name: &str| records.folder.join(name);
        fs::write(file("torn.json"), "{\"version\":1,").unwrap();
        fs::write(file(".good.draft"), "half").unwrap();
        fs::copy(file("good.json"), file("liar.json")).unwrap();
        let read = records.load().unwrap();
        assert_eq!(read.len(), 1);
        assert_eq!(read[0].name, "good");
        assert_eq!(fs::read_dir(&records.unreadable).unwrap().count(), 3);
        assert_eq!(fs::read_dir(&records.folder).unwrap().count(), 1);
    }

    #[test]
    fn what_is_removed_is_gone_and_may_be_removed_again() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::<Note>::at(dir.path());
        records.make().unwrap();
        records.save(&note(1, "n")).unwrap();
        for _ in 0..2 {
            records.remove("n").unwrap();
            assert!(records.load().unwrap().is_empty());
        }
    }
}

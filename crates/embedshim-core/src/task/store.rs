//! [`Store`]: one small JSON document per task in the state directory, replaced atomically. Owns
//! the files; the format is [`record`](super::record)'s, and the truth in memory is the task's.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use tracing::warn;

use crate::error::Error;
use crate::failpoint;
use crate::id::{ContainerId, Namespace, TaskKey};
use crate::task::record::{TaskRecord, VERSION};

/// Directory of the records below the state directory.
const TASKS: &str = "tasks";
/// Where unreadable records go, so that they are neither lost nor read again.
const UNREADABLE: &str = "unreadable";
const SUFFIX: &str = ".json";

/// Proof that a record was written: what the record says may be acted on (invariant 3).
#[derive(Debug)]
pub(crate) struct Saved(());

impl Saved {
    /// The task is removed, and with it its record: no successor says anything of it.
    pub(crate) fn without_record() -> Self {
        Self(())
    }
}

/// The directory of the records.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    tasks: PathBuf,
    unreadable: PathBuf,
}

impl Store {
    /// Opens (and makes) the store below `state_dir`. Blocks on the file system.
    pub(crate) fn open(state_dir: &Path) -> Result<Self, Error> {
        let store = Self::at(state_dir);
        store.make()?;
        Ok(store)
    }

    /// Makes the directory. Blocks on the file system.
    pub(crate) fn make(&self) -> Result<(), Error> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.tasks)
            .map_err(|source| Error::Path {
                doing: "cannot create the state directory",
                path: self.tasks.clone(),
                source,
            })
    }

    fn at(state_dir: &Path) -> Self {
        Self {
            tasks: state_dir.join(TASKS),
            unreadable: state_dir.join(UNREADABLE),
        }
    }

    /// Replaces the record: after a crash there is the old one or the new one. Blocks on the file
    /// system.
    ///
    /// Without fsync: the state directory is on tmpfs or its content is worthless after a power
    /// cut, since the processes are gone too.
    pub(crate) fn save(&self, record: &TaskRecord) -> Result<Saved, Error> {
        let path = self.path(&record.namespace, &record.id);
        // A container id cannot begin with a dot, nor can a namespace: no record has this name.
        let draft = self
            .tasks
            .join(format!(".{}:{}.draft", record.namespace, record.id));
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
        failpoint::step("before a record is written");
        let written = write();
        failpoint::step("after a record was written");
        written.map(Saved).map_err(|source| {
            let _ = fs::remove_file(&draft);
            Error::Path {
                doing: "cannot write the task record",
                path: path.clone(),
                source,
            }
        })
    }

    /// Removes the record, if there is one. Blocks on the file system.
    pub(crate) fn remove(&self, key: &TaskKey) -> Result<(), Error> {
        let path = self.path(&key.namespace, &key.id);
        failpoint::step("before a record is removed");
        let removed = fs::remove_file(&path);
        failpoint::step("after a record was removed");
        match removed {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Path {
                doing: "cannot remove the task record",
                path,
                source,
            }),
            _ => Ok(()),
        }
    }

    /// All records. What cannot be read is logged and moved aside, for a human to look at: one bad
    /// file must not keep the daemon from its other containers. Blocks on the file system.
    pub(crate) fn load(&self) -> Result<Vec<TaskRecord>, Error> {
        let failed = |source| Error::Path {
            doing: "cannot list the task records",
            path: self.tasks.clone(),
            source,
        };
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.tasks).map_err(failed)? {
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

    fn read(&self, path: &Path) -> Result<TaskRecord, String> {
        let text = fs::read(path).map_err(|e| e.to_string())?;
        let record: TaskRecord = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
        if record.version > VERSION {
            return Err(format!(
                "it is of version {}, this program knows {VERSION}",
                record.version
            ));
        }
        if self.path(&record.namespace, &record.id) != path {
            return Err(format!("it speaks of {}/{}", record.namespace, record.id));
        }
        Ok(record)
    }

    fn set_aside(&self, path: &Path, reason: &str) {
        warn!(path = %path.display(), reason, kept_in = %self.unreadable.display(), "cannot use a task record");
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

    fn path(&self, namespace: &Namespace, id: &ContainerId) -> PathBuf {
        // Neither part can hold a colon, so no two tasks share a name.
        self.tasks.join(format!("{namespace}:{id}{SUFFIX}"))
    }
}

/// Removes the record of a task that the caller has removed without a [`Node`](crate::task::Node)
/// on `state_dir`. Without a record there is nothing to do. Blocks on the file system.
pub fn discard_record(state_dir: &Path, key: &TaskKey) -> io::Result<()> {
    let store = Store::at(state_dir);
    match fs::remove_file(store.path(&key.namespace, &key.id)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// This boot, as the kernel names it. Blocks on procfs, which is quick.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::Bundle;
    use crate::runtime::RuntimeOptions;
    use crate::task::api::Exit;
    use crate::task::lifecycle::Phase;
    use crate::task::record::ProcessRecord;
    use std::collections::BTreeMap;

    fn record(id: &str) -> TaskRecord {
        TaskRecord {
            version: VERSION,
            boot_id: boot_id(),
            namespace: "ns".parse().unwrap(),
            id: id.parse().unwrap(),
            bundle: Bundle {
                path: "/b".into(),
                device: 1,
                inode: 2,
            },
            owner: String::new(),
            sandbox: None,
            runtime: RuntimeOptions::default(),
            rootfs: Vec::new(),
            checkpoint: None,
            complete: true,
            init: ProcessRecord {
                phase: Phase::Stopped,
                exit: Some(Exit {
                    code: 9,
                    at: std::time::SystemTime::UNIX_EPOCH,
                    status: None,
                    evidence: None,
                }),
                ..ProcessRecord::default()
            },
            execs: BTreeMap::new(),
            cgroup: None,
            oom_kills: 0,
            last_metrics: None,
            is_checkpointing: false,
            unknown: serde_json::Map::new(),
        }
    }

    #[test]
    fn fields_of_a_newer_daemon_survive_an_older_one() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let mut newer = record("c");
        newer
            .unknown
            .insert("invented_later".into(), serde_json::json!({"x": 1}));
        store.save(&newer).unwrap();
        let read = store.load().unwrap().remove(0);
        store.save(&read).unwrap();
        let again = store.load().unwrap().remove(0);
        assert_eq!(again.unknown["invented_later"]["x"], 1);
        assert_eq!(again.init.exit.unwrap().code, 9);
        store
            .remove(&TaskKey {
                namespace: again.namespace,
                id: again.id,
            })
            .unwrap();
        assert!(store.load().unwrap().is_empty());
    }

    #[test]
    fn an_exit_that_an_older_daemon_recorded_is_read() {
        let older = r#"{"code":255,"at":{"secs_since_epoch":1,"nanos_since_epoch":0}}"#;
        let exit: Exit = serde_json::from_str(older).unwrap();
        assert_eq!((exit.code, exit.status), (255, None));
    }

    #[test]
    fn a_bad_record_is_set_aside_and_the_others_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.save(&record("good")).unwrap();
        let mut future = record("future");
        future.version = VERSION + 1;
        store.save(&future).unwrap();
        fs::write(store.tasks.join("ns:torn.json"), "{\"version\":1,").unwrap();
        fs::write(store.tasks.join(".ns:good.draft"), "half").unwrap();
        fs::copy(
            store.tasks.join("ns:good.json"),
            store.tasks.join("ns:liar.json"),
        )
        .unwrap();
        let read = store.load().unwrap();
        assert_eq!(read.len(), 1);
        assert_eq!(read[0].id.as_str(), "good");
        assert_eq!(fs::read_dir(&store.unreadable).unwrap().count(), 3);
        assert_eq!(fs::read_dir(&store.tasks).unwrap().count(), 1);
    }
}

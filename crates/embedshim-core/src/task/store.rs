//! [`Store`]: the records of the tasks in the state directory. Owns when one may be acted on; the
//! format is [`record`](super::record)'s, and the truth in memory is the task's.

use std::fs;
use std::io;
use std::path::Path;

use crate::error::Error;
use crate::failpoint;
use crate::id::{ContainerId, Namespace, TaskKey};
use crate::records::{Record, RecordError, Records};
use crate::task::record::{TaskRecord, VERSION};

impl Record for TaskRecord {
    const WHAT: &'static str = "task";
    const FOLDER: &'static str = "tasks";
    const VERSION: u32 = VERSION;

    fn version(&self) -> u32 {
        self.version
    }

    fn name(&self) -> String {
        name(&self.namespace, &self.id)
    }
}

/// Neither part can hold a colon or begin with a dot.
fn name(namespace: &Namespace, id: &ContainerId) -> String {
    format!("{namespace}:{id}")
}

/// Proof that a record was written: what the record says may be acted on (invariant 3).
#[derive(Debug)]
pub(crate) struct Saved(());

impl Saved {
    /// The task is removed, and with it its record: no successor says anything of it.
    pub(crate) fn without_record() -> Self {
        Self(())
    }
}

/// The records of the tasks.
#[derive(Clone, Debug)]
pub(crate) struct Store(Records<TaskRecord>);

impl Store {
    /// Opens (and makes) the store below `state_dir`. Blocks on the file system.
    pub(crate) fn open(state_dir: &Path) -> Result<Self, Error> {
        let store = Self(Records::at(state_dir));
        store.make()?;
        Ok(store)
    }

    /// Makes the directory. Blocks on the file system.
    pub(crate) fn make(&self) -> Result<(), Error> {
        let made = self.0.make();
        made.map_err(failed("cannot create the state directory"))
    }

    /// Whether no operation here can wait for a device or another program.
    pub(crate) fn is_in_memory(&self) -> bool {
        self.0.is_in_memory()
    }

    /// Replaces the record: after a crash there is the old one or the new one. Blocks on the file
    /// system.
    pub(crate) fn save(&self, record: &TaskRecord) -> Result<Saved, Error> {
        failpoint::step("before a record is written");
        let written = self.0.save(record);
        failpoint::step("after a record was written");
        written
            .map(Saved)
            .map_err(failed("cannot write the task record"))
    }

    /// Removes the record, if there is one. Blocks on the file system.
    pub(crate) fn remove(&self, key: &TaskKey) -> Result<(), Error> {
        failpoint::step("before a record is removed");
        let removed = self.0.remove(&name(&key.namespace, &key.id));
        failpoint::step("after a record was removed");
        removed.map_err(failed("cannot remove the task record"))
    }

    /// All records, but for what cannot be read, which is moved aside. Blocks on the file system.
    pub(crate) fn load(&self) -> Result<Vec<TaskRecord>, Error> {
        self.0
            .load()
            .map_err(failed("cannot list the task records"))
    }
}

fn failed(doing: &'static str) -> impl FnOnce(RecordError) -> Error {
    move |RecordError { path, source }| Error::Path {
        doing,
        path,
        source,
    }
}

/// Removes the record of a task that the caller has removed without a [`Node`](crate::task::Node)
/// on `state_dir`. Without a record there is nothing to do. Blocks on the file system.
pub fn discard_record(state_dir: &Path, key: &TaskKey) -> io::Result<()> {
    let records = Records::<TaskRecord>::at(state_dir);
    let removed = records.remove(&name(&key.namespace, &key.id));
    removed.map_err(|error| error.source)
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
            traits: None,
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
    fn a_record_of_many_or_long_execs_is_not_small() {
        let exec = |length: usize| ProcessRecord {
            spec: Some("x".repeat(length)),
            ..ProcessRecord::default()
        };
        let with = |count: usize, length: usize| {
            let mut record = record("c");
            let ids = (0..count).map(|number| format!("e{number}").parse().unwrap());
            record.execs = ids.map(|id| (id, exec(length))).collect();
            record.is_small()
        };
        assert!(with(0, 0) && with(16, 100));
        assert!(!with(17, 0) && !with(1, 65 * 1024));
    }

    #[test]
    fn an_exit_that_an_older_daemon_recorded_is_read() {
        let older = r#"{"code":255,"at":{"secs_since_epoch":1,"nanos_since_epoch":0}}"#;
        let exit: Exit = serde_json::from_str(older).unwrap();
        assert_eq!((exit.code, exit.status), (255, None));
    }
}

//! [`Store`]: the records of the sandboxes in the state directory. The format is
//! [`record`](super::record)'s; whose error a failure is, is owned here.

use std::path::{Path, PathBuf};

use crate::failpoint;
use crate::id::SandboxKey;
use crate::records::{Record, RecordError, Records};
use crate::sandbox::error::{SandboxError, failed};
use crate::sandbox::record::{SandboxRecord, VERSION};

impl Record for SandboxRecord {
    const WHAT: &'static str = "sandbox";
    const FOLDER: &'static str = "sandboxes";
    const VERSION: u32 = VERSION;

    fn version(&self) -> u32 {
        self.version
    }

    fn name(&self) -> String {
        name(&self.key)
    }
}

/// Neither part can hold a colon or begin with a dot.
fn name(SandboxKey { namespace, id }: &SandboxKey) -> String {
    format!("{namespace}:{id}")
}

/// The records of the sandboxes.
#[derive(Clone, Debug)]
pub(super) struct Store(Records<SandboxRecord>);

impl Store {
    /// Opens (and makes) the store below `state_dir`. Blocks on the file system.
    pub(super) fn open(state_dir: &Path) -> Result<Self, SandboxError> {
        let store = Self(Records::at(state_dir));
        store.make()?;
        Ok(store)
    }

    /// Makes the directory. Blocks on the file system.
    pub(super) fn make(&self) -> Result<(), SandboxError> {
        let made = self.0.make();
        made.map_err(all_failed("cannot create the directory of sandbox records"))
    }

    /// Where the record of this sandbox is, or would be.
    pub(super) fn path(&self, key: &SandboxKey) -> PathBuf {
        self.0.path(&name(key))
    }

    /// Replaces the record: after a crash there is the old one or the new one. Blocks on the file
    /// system.
    pub(super) fn save(&self, record: &SandboxRecord) -> Result<(), SandboxError> {
        failpoint::step("before a sandbox's record is written");
        let written = self.0.save(record);
        failpoint::step("after a sandbox's record was written");
        written.map_err(|RecordError { path, source }| {
            failed(&record.key, "cannot write the record", &path)(source)
        })
    }

    /// Removes the record, if there is one. Blocks on the file system.
    pub(super) fn remove(&self, key: &SandboxKey) -> Result<(), SandboxError> {
        failpoint::step("before a sandbox's record is removed");
        let removed = self.0.remove(&name(key));
        removed.map_err(|RecordError { path, source }| {
            failed(key, "cannot remove the record", &path)(source)
        })
    }

    /// All records, but for what cannot be read, which is moved aside. Blocks on the file system.
    pub(super) fn load(&self) -> Result<Vec<SandboxRecord>, SandboxError> {
        let loaded = self.0.load();
        loaded.map_err(all_failed("cannot list the sandbox records"))
    }
}

fn all_failed(doing: &'static str) -> impl FnOnce(RecordError) -> SandboxError {
    move |RecordError { path, source }| SandboxError::Records {
        doing,
        path,
        source,
    }
}

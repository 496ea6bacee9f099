//! What is recorded of a sandbox, for a daemon that takes it up after this one. Owns the format and
//! its versions; reads and writes no file.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::SystemTime;

use exit_monitor::process::ProcessIdentity;
use serde::{Deserialize, Serialize};

use crate::id::SandboxKey;
use crate::sandbox::api::Ended;
use crate::sandbox::isolation::Isolation;

/// The format this program writes. A reader refuses what is newer and keeps fields it does not
/// know.
pub(super) const VERSION: u32 = 1;

/// How far a sandbox is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Phase {
    /// Its start has begun: a successor undoes it.
    Starting,
    /// Containers can be started in it.
    Ready,
    /// Its stop has begun: a successor finishes it.
    Stopping,
    /// Its namespaces are gone, its files are there.
    Stopped,
    /// Its removal has begun: a successor finishes it.
    Removing,
}

/// A pod's init process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Init {
    pub(super) identity: ProcessIdentity,
    /// Its cgroup, from the root of each hierarchy.
    pub(super) cgroup: PathBuf,
}

/// Everything the daemon has to remember about a sandbox.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SandboxRecord {
    pub(super) version: u32,
    pub(super) boot_id: String,
    #[serde(flatten)]
    pub(super) key: SandboxKey,
    pub(super) phase: Phase,
    pub(super) created_at: SystemTime,
    /// While it is stopped, the end that it will have.
    #[serde(default)]
    pub(super) ended: Option<Ended>,
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) isolation: Isolation,
    /// The init process of a pod whose containers share their processes, from before it can outlive
    /// the daemon that has started it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) init: Option<Init>,
    pub(super) labels: BTreeMap<String, String>,
    /// Fields of a newer version, given back unread.
    #[serde(flatten)]
    pub(super) unknown: serde_json::Map<String, serde_json::Value>,
}

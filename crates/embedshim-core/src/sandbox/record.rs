//! What is recorded of a sandbox, for a daemon that takes it up after this one. Owns the format and
//! its versions; reads and writes no file.

use std::collections::BTreeMap;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::id::SandboxKey;
use crate::sandbox::api::{Ended, Network, Processes, Reach};

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

/// Everything the daemon has to remember about a sandbox.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SandboxRecord {
    pub(super) version: u32,
    pub(super) boot_id: String,
    #[serde(flatten)]
    pub(super) key: SandboxKey,
    pub(super) phase: Phase,
    pub(super) created_at: SystemTime,
    #[serde(default)]
    pub(super) ended: Option<Ended>,
    pub(super) name: String,
    pub(super) network: Network,
    pub(super) ipc: Reach,
    pub(super) processes: Processes,
    pub(super) labels: BTreeMap<String, String>,
    /// Fields of a newer version, given back unread.
    #[serde(flatten)]
    pub(super) unknown: serde_json::Map<String, serde_json::Value>,
}

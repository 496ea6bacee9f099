//! What is recorded of a task, for a daemon that takes it up after this one. Owns the format and
//! its versions; reads and writes no file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::bundle::Bundle;
use crate::cgroup::{Cgroup, Metrics};
use crate::error::{Error, ErrorKind, chain};
use crate::id::{ContainerId, ExecId, Namespace, SandboxId, TaskKey};
use crate::process::ProcessIdentity;
use crate::rootfs::Mount;
use crate::runtime::RuntimeOptions;
use crate::spec::Traits;
use crate::stdio::{PipeInodes, StdioPaths};
use crate::task::api::Exit;
use crate::task::context::RequestId;
use crate::task::lifecycle::Phase;

/// The format this program writes. A reader refuses what is newer and keeps fields it does not
/// know.
pub(crate) const VERSION: u32 = 1;

/// Everything the daemon has to remember about a task.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct TaskRecord {
    pub(crate) version: u32,
    pub(crate) boot_id: String,
    pub(crate) namespace: Namespace,
    pub(crate) id: ContainerId,
    pub(crate) bundle: Bundle,
    pub(crate) owner: String,
    /// The sandbox that it is in, if embedshim is its controller.
    #[serde(default)]
    pub(crate) sandbox: Option<SandboxId>,
    pub(crate) runtime: RuntimeOptions,
    pub(crate) rootfs: Vec<Mount>,
    /// What its spec says; records of an older version lack it.
    #[serde(default)]
    pub(crate) traits: Option<Traits>,
    /// The image that `Start` restores.
    #[serde(default)]
    pub(crate) checkpoint: Option<PathBuf>,
    /// `create` has come to its end: what lacks this is what a daemon left that died within it.
    pub(crate) complete: bool,
    pub(crate) init: ProcessRecord,
    #[serde(default)]
    pub(crate) execs: BTreeMap<ExecId, ProcessRecord>,
    #[serde(default)]
    pub(crate) cgroup: Option<Cgroup>,
    #[serde(default)]
    pub(crate) oom_kills: u64,
    #[serde(default)]
    pub(crate) last_metrics: Option<Metrics>,
    /// A checkpoint of it has begun, and with that it may be frozen.
    #[serde(default)]
    pub(crate) is_checkpointing: bool,
    /// Fields of a newer version, given back unread.
    #[serde(flatten)]
    pub(crate) unknown: serde_json::Map<String, serde_json::Value>,
}

impl TaskRecord {
    /// Execs of a record that takes microseconds to be written, and the bytes of their documents.
    const FEW: usize = 16;
    const SHORT: usize = 64 * 1024;

    /// Whether writing it takes microseconds: a client can declare thousands of execs, with
    /// documents of megabytes.
    pub(crate) fn is_small(&self) -> bool {
        let documents = self.execs.values().filter_map(|exec| exec.spec.as_ref());
        let bytes: usize = documents.map(String::len).sum();
        self.execs.len() <= Self::FEW && bytes <= Self::SHORT
    }

    /// The task's name.
    pub(crate) fn key(&self) -> TaskKey {
        TaskKey {
            namespace: self.namespace.clone(),
            id: self.id.clone(),
        }
    }
}

/// The runtime was about to start the process, or has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StartMark {
    /// On whose behalf.
    pub(crate) request: Option<RequestId>,
    /// When, as start times of processes are counted; 0 in the record of an older version.
    #[serde(default)]
    pub(crate) ticks: u64,
    /// Which program an init executed then, which is the runtime's.
    #[serde(default)]
    pub(crate) program: Option<PathBuf>,
}

/// The start of an exec has failed, as the client is told or was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FailedStart {
    /// Who asked for it.
    pub(crate) request: Option<RequestId>,
    pub(crate) kind: ErrorKind,
    /// The error with its causes, of which the beginning is kept.
    pub(crate) text: String,
}

impl FailedStart {
    /// Runtimes say less than this.
    const MAX_TEXT: usize = 16 * 1024;

    pub(crate) fn new(request: Option<RequestId>, error: &Error) -> Self {
        let mut text = chain(error);
        text.truncate(text.floor_char_boundary(Self::MAX_TEXT));
        Self {
            request,
            kind: error.kind(),
            text,
        }
    }

    pub(crate) fn error(self) -> Error {
        Error::Refused {
            kind: self.kind,
            text: self.text,
        }
    }
}

/// What there is to remember about one process.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct ProcessRecord {
    pub(crate) phase: Phase,
    pub(crate) stdio: StdioPaths,
    #[serde(default)]
    pub(crate) identity: Option<ProcessIdentity>,
    #[serde(default)]
    pub(crate) exit: Option<Exit>,
    /// The daemon has no writer of its input any more.
    #[serde(default)]
    pub(crate) stdin_closed: bool,
    /// Its pipes, by inode.
    #[serde(default)]
    pub(crate) pipes: PipeInodes,
    /// The `binary://` logger that reads its output.
    #[serde(default)]
    pub(crate) logger: Option<ProcessIdentity>,
    /// The OCI `Process` of an exec that was not started yet.
    #[serde(default)]
    pub(crate) spec: Option<String>,
    /// Under which its descriptors are kept; 0 in the record of a version that kept none.
    #[serde(default)]
    pub(crate) number: u64,
    /// The request that made it.
    #[serde(default)]
    pub(crate) made_by: Option<RequestId>,
    /// Its start has begun.
    #[serde(default)]
    pub(crate) start: Option<StartMark>,
    /// This exec could not be started: its waiters are let go.
    #[serde(default)]
    pub(crate) start_failed: bool,
    /// How, in the record of a version that notes it.
    #[serde(default)]
    pub(crate) failed_start: Option<FailedStart>,
    /// Its runtime was killed before it said whether this exec runs: it is not started again.
    #[serde(default)]
    pub(crate) may_have_run: bool,
}

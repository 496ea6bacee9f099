//! The [`ExitMonitor`] trait: learn how watched processes end without being their parent.
//! Owns the contract every backend keeps; implements none of it.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::process::{OpenError, Process, ProcessIdentity};
use crate::{ExitRecord, Guarantees, UnknownReason};

/// Learns how watched processes end, without being their parent.
///
/// A watch is keyed by the process's [`ProcessIdentity`], which is the same in every daemon that
/// ever looks at that process; so a successor needs no translation table to take over.
///
/// Any crate can implement this trait; `tests/outside` in embedshim's repository is an example. The
/// crate `exit-conformance` tests an implementation. Beside what each function says, it has to:
///
/// - report the end of each watched process once, and report no other process;
/// - never report a status that it does not know: [`ExitRecord::unknown`] says so;
/// - reap children of its own process, and only those: not before [`confirm`](Self::confirm) or
///   [`unwatch`](Self::unwatch), so that the zombie still has the status if this process dies.
#[async_trait]
pub trait ExitMonitor: fmt::Debug + Send + Sync + 'static {
    /// Which backend this is.
    fn backend(&self) -> Backend;

    /// What this backend promises on this kernel.
    fn guarantees(&self) -> Guarantees;

    /// Registers first, then checks liveness. After [`Watched::Armed`] the end of this process can
    /// no longer be missed and comes through [`next_exits`](Self::next_exits); after
    /// [`Watched::Ended`] it is over, and `next_exits` will not report it again.
    ///
    /// Watching a watched process again is not an error and changes nothing.
    async fn watch(&self, process: Arc<Process>) -> Result<Watched, WatchError>;

    /// After a restart: takes over the watches of a predecessor. Answers in the order of `known`.
    ///
    /// As provided, for monitors that record nothing outside of their process, it watches what
    /// lives; a process that is gone has ended with an unknown status.
    async fn adopt(&self, known: Vec<Known>) -> Result<Vec<Adopted>, WatchError> {
        let mut adopted = Vec::with_capacity(known.len());
        for known in known {
            let identity = known.identity;
            adopted.push(match known.open().map(Arc::new) {
                Ok(process) => match self.watch(Arc::clone(&process)).await? {
                    Watched::Armed => Adopted::Armed(process),
                    Watched::Ended(record) => Adopted::Ended(record),
                },
                Err(OpenError::Gone { .. }) => {
                    Adopted::Ended(ExitRecord::unknown(identity, UnknownReason::Unwatched))
                }
                Err(error) => return Err(error.into()),
            });
        }
        Ok(adopted)
    }

    /// Waits for the next exits and appends them to `into`. Cancel-safe. An exit that is not
    /// [confirmed](Self::confirm) is reported again by the next instance's [`adopt`](Self::adopt).
    async fn next_exits(&self, into: &mut Vec<ExitRecord>) -> Result<(), WatchError>;

    /// The record is durable elsewhere: the backend may forget it. Idempotent.
    async fn confirm(&self, process: ProcessIdentity) -> Result<(), WatchError>;

    /// Never mind this process. Idempotent.
    async fn unwatch(&self, process: ProcessIdentity) -> Result<(), WatchError>;
}

/// What [`ExitMonitor::watch`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Watched {
    /// It lives, and its end will be reported.
    Armed,
    /// It is already over.
    Ended(ExitRecord),
}

/// A process that a predecessor has watched.
#[derive(Debug)]
pub struct Known {
    /// Which one.
    pub identity: ProcessIdentity,
    /// Its pidfd, if it was kept: since Linux 6.15 that is enough to learn its status, even if it
    /// is reaped.
    pub pidfd: Option<OwnedFd>,
}

impl From<ProcessIdentity> for Known {
    fn from(identity: ProcessIdentity) -> Self {
        Self {
            identity,
            pidfd: None,
        }
    }
}

impl Known {
    /// The process, by the pidfd that was kept or by its number.
    pub fn open(self) -> Result<Process, OpenError> {
        match self.pidfd {
            Some(pidfd) => Process::from_pidfd(self.identity, pidfd),
            None => Process::reopen(self.identity),
        }
    }
}

/// What [`ExitMonitor::adopt`] found for one process.
#[derive(Clone, Debug)]
pub enum Adopted {
    /// It lives, and its end will be reported. The caller may keep the process.
    Armed(Arc<Process>),
    /// It ended while it was not watched; the status may still be exact.
    Ended(ExitRecord),
}

/// The backends there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Backend {
    /// A pinned eBPF program records every watched exit in the kernel.
    Bpf,
    /// pidfds: children by `waitid`, others by `PIDFD_INFO_EXIT`.
    Pidfd,
    /// A tracer thread.
    Ptrace,
    /// A monitor that is none of embedshim's; its `Debug` says which.
    Other,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bpf => "bpf",
            Self::Pidfd => "pidfd",
            Self::Ptrace => "ptrace",
            Self::Other => "other",
        })
    }
}

/// A process that is gone counts as refused by the kernel, with `ESRCH`.
impl From<OpenError> for WatchError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Gone { pid } => Self::Kernel {
                call: "pidfd_open",
                pid,
                source: nix::errno::Errno::ESRCH.into(),
            },
            OpenError::Kernel { call, pid, source } => Self::Kernel { call, pid, source },
        }
    }
}

/// Why a watch could not be set or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WatchError {
    /// The backend's table is full; the process is not watched.
    #[error(
        "the exit monitor's table is full: {capacity} processes are watched already; raise monitor.capacity"
    )]
    TableFull {
        /// How many entries it has.
        capacity: u32,
    },
    /// The backend cannot run here.
    #[error("the {backend} exit monitor cannot run here: {why}")]
    Unsupported {
        /// Which one.
        backend: Backend,
        /// What is missing, and what would help.
        why: String,
    },
    /// The kernel refused a call.
    #[error("{call} failed for process {pid}")]
    Kernel {
        /// The call.
        call: &'static str,
        /// The process, or 0 where the call is not about one.
        pid: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

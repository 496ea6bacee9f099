//! [`ExitRecord`]: one observed end of one process, with its time and where the knowledge is from.

use serde::{Deserialize, Serialize};

use super::ExitStatus;
use crate::clock::BootTime;
use crate::process::ProcessIdentity;

/// One observed end of one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Which process ended.
    pub process: ProcessIdentity,
    /// How it ended.
    pub status: ExitStatus,
    /// When: the kernel's own time of the exit where the backend knows it, else when it was seen.
    pub at: BootTime,
    /// Who knows.
    pub evidence: Evidence,
}

/// Where an exit status was learned, in falling order of authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Evidence {
    /// `waitid` on our own child.
    Wait,
    /// `PIDFD_INFO_EXIT` of a reaped process (Linux 6.15).
    PidfdInfo,
    /// The eBPF program's record.
    Bpf,
    /// Field 52 of `/proc/PID/stat` of a zombie.
    Zombie,
    /// The tracer's wait status.
    Ptrace,
    /// Nobody knows.
    None,
}

//! [`ExitRecord`]: one observed end of one process, with its time and where the knowledge is from.

use serde::{Deserialize, Serialize};

use crate::process::ProcessIdentity;
use crate::{BootTime, ExitStatus, UnknownReason};

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

impl ExitRecord {
    /// The record of a process that has ended, seen now, when it cannot be known how.
    pub fn unknown(process: ProcessIdentity, reason: UnknownReason) -> Self {
        Self {
            process,
            status: ExitStatus::Unknown { reason },
            at: BootTime::now(),
            evidence: Evidence::None,
        }
    }
}

/// Where an exit status was learned, in falling order of authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Evidence {
    /// `waitid` on our own child.
    Wait,
    /// The eBPF program's record.
    Bpf,
    /// The tracer's wait status.
    Ptrace,
    /// Field 52 of `/proc/PID/stat` of a zombie. Before Linux 5.17 it has the main thread's own
    /// code, even if another thread ended the process or a pid namespace was rebooted, and so has
    /// waitid(2) with WNOWAIT on our own child, which counts as this there.
    Zombie,
    /// `PIDFD_INFO_EXIT` of a reaped process (Linux 6.15). It is the main thread's own code if that
    /// thread ended by itself while the last of the others did: the kernel puts the process's
    /// status there only if the others were still to be released (`release_task()`, seen on 6.18
    /// and 7.3). And of the first process of a pid namespace that was rebooted (reboot(2)) it is 0
    /// or SIGKILL, while its parent sees SIGHUP or SIGINT (`zap_pid_ns_processes()`).
    PidfdInfo,
    /// It is unknown.
    None,
}

//! [`Guarantees`]: what a backend promises on a kernel, in an order that makes promises comparable.
//! Promises nothing itself.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a backend promises on this kernel. Ordered: greater is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Guarantees {
    /// Who may die without an exit being lost.
    pub survives: Survives,
    /// When the status of a process that is not our child is the one its parent sees.
    pub others: Exactness,
    /// The time of the exit is the kernel's, not that of its observation.
    pub exact_time: bool,
}

/// What can be lost with the watcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Survives {
    /// An exit while the daemon is down is lost.
    Nothing,
    /// An exit while the daemon is down is known if the pidfd was kept.
    WithDescriptors,
    /// An exit is recorded although the daemon is dead.
    Everything,
}

/// How sure a status is. A backend that does not know says so
/// ([`ExitStatus::Unknown`](crate::ExitStatus::Unknown)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exactness {
    /// Known until the process is reaped, then unknown.
    UntilReaped,
    /// Known, but if the main thread ends by itself at the very moment in which the process does,
    /// or reboot(2) ends the first process of a pid namespace, it can be the main thread's own
    /// code: see [`Evidence::PidfdInfo`](crate::Evidence::PidfdInfo).
    UnlessThreadsRace,
    /// Always.
    Always,
}

impl fmt::Display for Guarantees {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}; {}; {}",
            self.survives,
            self.others,
            if self.exact_time {
                "time of the exit"
            } else {
                "time of its observation"
            }
        )
    }
}

impl fmt::Display for Survives {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "an exit while the daemon is down is lost",
            Self::WithDescriptors => {
                "an exit while the daemon is down is known if its pidfd is kept"
            }
            Self::Everything => "an exit is recorded while the daemon is dead",
        })
    }
}

impl fmt::Display for Exactness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UntilReaped => "exact status of children, of others until they are reaped",
            Self::UnlessThreadsRace => {
                "exact status unless threads end at the same moment or an init reboots"
            }
            Self::Always => "exact status",
        })
    }
}

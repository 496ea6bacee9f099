//! [`ExitStatus`]: how a process ended. Owns the decoding of the kernel's wait status;
//! never invents a number: what was not observed is `Unknown`, with the reason.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ExitStatus {
    /// It called `exit` with this code.
    Exited(u8),
    /// A signal ended it.
    Signaled {
        /// The signal's number, 1 to 64.
        signal: u8,
        /// The kernel set the core-dump flag (0x80) in the wait status.
        core_dumped: bool,
    },
    /// It is dead, and how it ended cannot be learned.
    Unknown {
        /// Why not.
        reason: UnknownReason,
    },
}

/// Why an exit status could not be learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum UnknownReason {
    /// It is not our child, another process reaped it, and the kernel keeps no exit
    /// information for pidfds (before Linux 6.15).
    NotOurChild,
    /// It ended while it was not watched, and no record was kept.
    Unwatched,
    /// The kernel's answer could not be decoded.
    Undecodable,
}

impl fmt::Display for UnknownReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotOurChild => "reaped by another process, and the kernel keeps no status for it",
            Self::Unwatched => "it ended while it was not watched",
            Self::Undecodable => "the kernel's answer could not be decoded",
        })
    }
}

impl ExitStatus {
    /// The number containerd and shells show for an unknown status.
    pub const UNKNOWN_CODE: u32 = 255;

    /// Decodes a wait status as `waitpid(2)` returns it.
    pub fn from_wait_status(raw: i32) -> Self {
        let signal = raw & 0x7f;
        match (
            signal,
            u8::try_from((raw >> 8) & 0xff),
            u8::try_from(signal),
        ) {
            (0, Ok(code), _) => Self::Exited(code),
            // 0x7f is "stopped", 0xffff is "continued": neither is an end.
            (1..=0x7e, _, Ok(signal)) => Self::Signaled {
                signal,
                core_dumped: raw & 0x80 != 0,
            },
            _ => Self::Unknown {
                reason: UnknownReason::Undecodable,
            },
        }
    }

    /// The exit code as shells and containerd count it: the code, 128 + signal, or 255 for what is
    /// unknown, and for nothing else (invariant 4).
    pub fn code(self) -> u32 {
        match self {
            Self::Exited(code) => u32::from(code),
            Self::Signaled { signal, .. } => 128 + u32::from(signal),
            Self::Unknown { .. } => Self::UNKNOWN_CODE,
        }
    }

    /// Whether the status is the process's own, not a stand-in.
    pub fn is_known(self) -> bool {
        !matches!(self, Self::Unknown { .. })
    }
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit {code}"),
            Self::Signaled {
                signal,
                core_dumped: false,
            } => write!(f, "signal {signal}"),
            Self::Signaled {
                signal,
                core_dumped: true,
            } => write!(f, "signal {signal}, core dumped"),
            Self::Unknown { reason } => write!(f, "unknown ({reason})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_statuses_decode_as_waitpid_macros_do() {
        assert_eq!(ExitStatus::from_wait_status(0x2a00), ExitStatus::Exited(42));
        assert_eq!(
            ExitStatus::from_wait_status(9),
            ExitStatus::Signaled {
                signal: 9,
                core_dumped: false
            }
        );
        assert_eq!(
            ExitStatus::from_wait_status(0x86),
            ExitStatus::Signaled {
                signal: 6,
                core_dumped: true
            }
        );
        assert!(!ExitStatus::from_wait_status(0x137f).is_known());
        assert!(!ExitStatus::from_wait_status(0xffff).is_known());
    }

    #[test]
    fn codes_are_the_shells() {
        assert_eq!(ExitStatus::Exited(7).code(), 7);
        assert_eq!(ExitStatus::from_wait_status(9).code(), 137);
        assert_eq!(ExitStatus::from_wait_status(0x86).code(), 134);
        assert_eq!(
            ExitStatus::Unknown {
                reason: UnknownReason::Unwatched
            }
            .code(),
            255
        );
    }
}

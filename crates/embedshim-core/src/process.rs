//! A process that cannot be confused with another: [`Process`] is a pidfd plus [`ProcessIdentity`].
//! Owns pid-reuse safety; knows nothing of containers.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::statfs::{FsType, fstatfs};
use pidfd_util::{PidFd, PidFdExt};
use serde::{Deserialize, Serialize};

/// `PID_FS_MAGIC` of linux/magic.h: the pidfd is a pidfs inode (6.9), unique for the boot.
const PIDFS_MAGIC: FsType = FsType(0x5049_4446);

/// Which process, in a way that survives pid reuse and restarts of the observer.
///
/// Two identities are equal only if they name the same process of the same boot, provided both were
/// read on the same kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// The thread-group id in the observer's pid namespace.
    pub pid: i32,
    /// Field 22 of `/proc/PID/stat`: start time in clock ticks (1/100 s) since boot.
    pub start_ticks: u64,
    /// The pidfs inode number, where the kernel has pidfs (6.9).
    pub inode: Option<u64>,
}

/// Why a process could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is no such process, or its number now belongs to another one.
    #[error("process {pid} is gone")]
    Gone {
        /// The number asked for.
        pid: i32,
    },
    /// The kernel refused.
    #[error("{call} failed for process {pid}")]
    Kernel {
        /// The call.
        call: &'static str,
        /// The number asked for.
        pid: i32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// A process held by its pidfd: while this value lives, its number is never mistaken for another's.
pub struct Process {
    identity: ProcessIdentity,
    pidfd: OwnedFd,
}

impl Process {
    /// Opens the process with this number, living or zombie (Linux 5.3).
    pub fn open(pid: i32) -> Result<Self, OpenError> {
        let kernel = |call| move |source| OpenError::Kernel { call, pid, source };
        if pid <= 0 {
            return Err(OpenError::Gone { pid });
        }
        let pidfd: OwnedFd = match PidFd::from_pid(pid) {
            Err(e) if e.raw_os_error() == Some(Errno::ESRCH as i32) => {
                return Err(OpenError::Gone { pid });
            }
            other => other.map_err(kernel("pidfd_open"))?.into(),
        };
        let start_ticks = match read_start_ticks(pid) {
            Err(e)
                if matches!(e.kind(), io::ErrorKind::NotFound)
                    || e.raw_os_error() == Some(Errno::ESRCH as i32) =>
            {
                return Err(OpenError::Gone { pid });
            }
            other => other.map_err(kernel("reading /proc/PID/stat"))?,
        };
        let identity = ProcessIdentity {
            pid,
            start_ticks,
            inode: pidfs_inode(pidfd.as_fd()).map_err(kernel("fstatfs"))?,
        };
        let process = Self { identity, pidfd };
        // The stat file was read by number. Only if the pidfd's process is unreaped even now was it its own.
        if process.is_reaped().map_err(kernel("pidfd_send_signal"))? {
            return Err(OpenError::Gone { pid });
        }
        Ok(process)
    }

    /// Opens the very process that `identity` names; another one with its number counts as gone.
    pub fn reopen(identity: ProcessIdentity) -> Result<Self, OpenError> {
        let process = Self::open(identity.pid)?;
        if process.identity == identity {
            Ok(process)
        } else {
            Err(OpenError::Gone { pid: identity.pid })
        }
    }

    /// Who it is.
    pub fn identity(&self) -> ProcessIdentity {
        self.identity
    }

    /// The pidfd; readable once the whole thread group has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Whether the whole thread group has ended, reaped or not.
    pub fn has_ended(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.pidfd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, PollTimeout::ZERO) {
                Err(Errno::EINTR) => {}
                other => return Ok(other? > 0),
            }
        }
    }

    /// Sends a signal. `ESRCH` if it is reaped already.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        // A duplicate, since `PidFd` caches the exit status in a way that cannot be shared by threads.
        PidFd::from(self.pidfd.try_clone()?).send_signal(signal)
    }

    fn is_reaped(&self) -> io::Result<bool> {
        match self.signal(0) {
            Err(e) if e.raw_os_error() == Some(Errno::ESRCH as i32) => Ok(true),
            // A process we may not signal is a process nonetheless.
            Err(e) if e.raw_os_error() == Some(Errno::EPERM as i32) => Ok(false),
            other => other.map(|()| false),
        }
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd()
    }
}

fn pidfs_inode(pidfd: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    // Before 6.9 a pidfd is an anonymous inode that all pidfds share.
    if fstatfs(pidfd)?.filesystem_type() != PIDFS_MAGIC {
        return Ok(None);
    }
    Ok(Some(nix::sys::stat::fstat(pidfd)?.st_ino))
}

/// Field 22 of `/proc/PID/stat`.
fn read_start_ticks(pid: i32) -> io::Result<u64> {
    parse_stat_field(&fs::read(format!("/proc/{pid}/stat"))?, 22)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no start time"))
}

/// One numeric field (1-based, as proc(5) counts, 3 or later) of `/proc/PID/stat`.
///
/// The command name in field 2 is the process's own choice and may hold blanks and parentheses: the last
/// closing parenthesis ends it.
pub fn parse_stat_field(stat: &[u8], field: usize) -> Option<u64> {
    let close = stat.iter().rposition(|&b| b == b')')?;
    let rest = std::str::from_utf8(stat.get(close + 1..)?).ok()?;
    rest.split_ascii_whitespace()
        .nth(field.checked_sub(3)?)?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = b"42 (a) R 9 (x)) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 777 9";
        assert_eq!(parse_stat_field(stat, 22), Some(777));
        assert_eq!(parse_stat_field(b"", 22), None);
        assert_eq!(parse_stat_field(b"1 (x)", 2), None);
    }

    #[test]
    fn a_zombie_can_be_opened_and_a_reaped_process_is_gone() {
        let mut child = Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let process = Process::open(pid).unwrap();
        while !process.has_ended().unwrap() {
            std::thread::yield_now();
        }
        let zombie = Process::open(pid).unwrap();
        assert_eq!(zombie.identity(), process.identity());
        child.wait().unwrap();
        assert!(matches!(
            Process::reopen(process.identity()),
            Err(OpenError::Gone { .. })
        ));
    }

    #[test]
    fn an_identity_with_another_start_time_is_gone() {
        let me = Process::open(i32::try_from(std::process::id()).unwrap()).unwrap();
        let mut other = me.identity();
        other.start_ticks += 1;
        assert!(matches!(
            Process::reopen(other),
            Err(OpenError::Gone { .. })
        ));
        assert!(!me.has_ended().unwrap());
    }
}

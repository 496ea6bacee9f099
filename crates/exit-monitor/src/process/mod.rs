//! A process that cannot be confused with another: [`Process`] is a pidfd plus [`ProcessIdentity`].
//! Owns pid-reuse safety (invariant 1); knows nothing of containers. Where the kernel has no pidfds
//! (before 5.3, or behind a seccomp filter) the identity alone is compared, right before and after
//! each use of the number.

mod dying;
mod host_root;
mod stat;

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::statfs::{FsType, fstatfs};
use pidfd_util::{PidFd, PidFdExt};
use serde::{Deserialize, Serialize};

use stat::{START_TIME, read_start_ticks, stat_state};

pub use host_root::HostRoot;
pub use stat::parse_stat_field;

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
    /// Field 22 of `/proc/PID/stat`: start time in clock ticks (1/100 s) since boot, as
    /// the time namespace of the reader has it.
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
    pidfd: Option<OwnedFd>,
}

impl Process {
    /// Opens the process with this number, living or zombie. Without a pidfd where the kernel has
    /// none (before Linux 5.3).
    pub fn open(pid: i32) -> Result<Self, OpenError> {
        let kernel = |call| move |source| OpenError::Kernel { call, pid, source };
        if pid <= 0 {
            return Err(OpenError::Gone { pid });
        }
        let pidfd: Option<OwnedFd> = match PidFd::from_pid(pid) {
            Ok(pidfd) => Some(pidfd.into()),
            Err(error) if is(&error, Errno::ESRCH) => return Err(OpenError::Gone { pid }),
            // EPERM is a seccomp filter's answer: the call itself needs no right.
            Err(error) if is(&error, Errno::ENOSYS) || is(&error, Errno::EPERM) => None,
            Err(source) => return Err(kernel("pidfd_open")(source)),
        };
        let start_ticks = match read_start_ticks(pid) {
            Err(error) if is_gone(&error) => return Err(OpenError::Gone { pid }),
            other => other.map_err(kernel("reading /proc/PID/stat"))?,
        };
        let inode = match &pidfd {
            Some(pidfd) => pidfs_inode(pidfd.as_fd()).map_err(kernel("fstatfs"))?,
            None => None,
        };
        let identity = ProcessIdentity {
            pid,
            start_ticks,
            inode,
        };
        let process = Self { identity, pidfd };
        // The stat file was read by number. Only if the pidfd's process is unreaped even now was it
        // its own.
        if process.is_reaped().map_err(kernel("pidfd_send_signal"))? {
            return Err(OpenError::Gone { pid });
        }
        Ok(process)
    }

    /// The process that `identity` names, by a pidfd that was kept of it, reaped or not. A
    /// pidfd of another process counts as gone.
    pub fn from_pidfd(identity: ProcessIdentity, pidfd: OwnedFd) -> Result<Self, OpenError> {
        let pid = identity.pid;
        let kernel = |call| move |source| OpenError::Kernel { call, pid, source };
        let inode = pidfs_inode(pidfd.as_fd()).map_err(kernel("fstatfs"))?;
        let process = Self {
            identity,
            pidfd: Some(pidfd),
        };
        let is_same = match (identity.inode, inode) {
            (Some(known), Some(found)) => known == found,
            // Without pidfs a reaped process cannot be compared any more; the name it was kept
            // under has to do.
            _ => {
                process.is_reaped().map_err(kernel("pidfd_send_signal"))?
                    || read_start_ticks(pid).is_ok_and(|ticks| ticks == identity.start_ticks)
            }
        };
        if is_same {
            Ok(process)
        } else {
            Err(OpenError::Gone { pid })
        }
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

    /// The pidfd, if the kernel has them; readable once the whole thread group has ended.
    pub fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(AsFd::as_fd)
    }

    /// Whether the whole thread group has ended, reaped or not.
    pub fn has_ended(&self) -> io::Result<bool> {
        let Some(pidfd) = self.pidfd() else {
            return self.has_ended_by_stat();
        };
        let mut fds = [PollFd::new(pidfd, PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, PollTimeout::ZERO) {
                Err(Errno::EINTR) => {}
                other => return Ok(other? > 0),
            }
        }
    }

    /// A main thread that ended first is a zombie while others go on: only one that is its group's
    /// last thread is the end.
    fn has_ended_by_stat(&self) -> io::Result<bool> {
        const THREADS: usize = 20;
        let stat = match stat::read(self.identity.pid) {
            Err(error) if is_gone(&error) => return Ok(true),
            other => other?,
        };
        if parse_stat_field(&stat, START_TIME) != Some(self.identity.start_ticks) {
            return Ok(true);
        }
        let is_zombie = matches!(stat_state(&stat), Some(b'Z' | b'X'));
        Ok(is_zombie && parse_stat_field(&stat, THREADS).is_none_or(|threads| threads <= 1))
    }

    /// The number of its parent, of one that is not reaped.
    pub fn parent(&self) -> Option<i32> {
        const PARENT: usize = 4;
        let stat = stat::read(self.identity.pid).ok()?;
        let is_its = parse_stat_field(&stat, START_TIME) == Some(self.identity.start_ticks);
        let parent = is_its.then(|| parse_stat_field(&stat, PARENT)).flatten()?;
        i32::try_from(parent).ok()
    }

    /// The path of the program that it executes, as the kernel knows it: neither the file nor its
    /// file system is asked. `None` of one that has ended.
    pub fn program(&self) -> Option<PathBuf> {
        let program = fs::read_link(format!("/proc/{}/exe", self.identity.pid)).ok()?;
        // The link was read by number.
        let is_its = self.is_reaped().is_ok_and(|is_reaped| !is_reaped);
        is_its.then_some(program)
    }

    /// Whether one of its threads is blocked in this system call.
    pub fn is_blocked_in(&self, call: i64) -> bool {
        let directory = format!("/proc/{}/task", self.identity.pid);
        let threads = fs::read_dir(directory).into_iter().flatten().flatten();
        let is_any = threads.into_iter().any(|thread| {
            // "running", or the call's number and its arguments.
            let text = fs::read_to_string(thread.path().join("syscall")).unwrap_or_default();
            let number = text.split(' ').next().and_then(|word| word.parse().ok());
            number == Some(call)
        });
        // The files were read by number.
        is_any && self.is_reaped().is_ok_and(|is_reaped| !is_reaped)
    }

    /// Sends a signal. `ESRCH` if it is reaped already.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        let Some(pidfd) = &self.pidfd else {
            let pid = self.identity.pid;
            if !read_start_ticks(pid).is_ok_and(|ticks| ticks == self.identity.start_ticks) {
                return Err(Errno::ESRCH.into());
            }
            return crate::sys::kill(pid, signal);
        };
        // A duplicate, since `PidFd` caches the exit status in a way that cannot be shared by
        // threads.
        PidFd::from(pidfd.try_clone()?).send_signal(signal)
    }

    /// Whether a SIGKILL is pending, as it is of a process that is frozen in a cgroup of version 1.
    /// Not if it is reaped.
    pub fn is_being_killed(&self) -> bool {
        const BIT: u64 = 1 << (libc::SIGKILL - 1);
        let pid = self.identity.pid;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let is_pending = status.lines().any(|line| {
            let signals = ["SigPnd:", "ShdPnd:"]
                .iter()
                .find_map(|key| line.strip_prefix(key));
            let signals = signals.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
            signals.is_some_and(|signals| signals & BIT != 0)
        });
        // The file was read by number.
        is_pending && self.is_reaped().is_ok_and(|is_reaped| !is_reaped)
    }

    /// Whether it was killed, and what is left of it sleeps uninterruptibly in the kernel. None of
    /// its threads executes an instruction of its program again, however long that lasts: each ends
    /// where it would return from the kernel. A system call that it is in may still take effect.
    /// Not if it has ended.
    pub fn is_held_up_in_its_end(&self) -> bool {
        // The files are read by number.
        dying::is_held_up(self.identity.pid) && !self.has_ended().unwrap_or(true)
    }

    fn is_reaped(&self) -> io::Result<bool> {
        match self.signal(0) {
            Err(error) if is(&error, Errno::ESRCH) => Ok(true),
            // A process we may not signal is a process nonetheless.
            Err(error) if is(&error, Errno::EPERM) => Ok(false),
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

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno as i32)
}

/// What `/proc/PID` answers when there is no such process, or none any more.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || is(error, Errno::ESRCH)
}

fn pidfs_inode(pidfd: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    // Before 6.9 a pidfd is an anonymous inode that all pidfds share.
    if fstatfs(pidfd)?.filesystem_type() != PIDFS_MAGIC {
        return Ok(None);
    }
    Ok(Some(nix::sys::stat::fstat(pidfd)?.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

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
    fn without_pidfds_the_stat_file_tells() {
        let mut child = Command::new("true").spawn().unwrap();
        let opened = Process::open(i32::try_from(child.id()).unwrap()).unwrap();
        let process = Process {
            identity: opened.identity(),
            pidfd: None,
        };
        while !opened.has_ended().unwrap() {
            std::thread::yield_now();
        }
        assert!(process.has_ended().unwrap());
        process.signal(0).unwrap();
        child.wait().unwrap();
        assert!(process.has_ended().unwrap());
        assert!(process.signal(0).is_err());
        let me = Process {
            identity: Process::open(i32::try_from(std::process::id()).unwrap())
                .unwrap()
                .identity(),
            pidfd: None,
        };
        assert!(!me.has_ended().unwrap());
    }

    #[test]
    fn a_kept_pidfd_is_its_processs_for_ever() {
        let mut children = [(); 2].map(|()| Command::new("true").spawn().unwrap());
        let [one, other] = children
            .each_ref()
            .map(|child| Process::open(i32::try_from(child.id()).unwrap()).unwrap());
        let keep = |process: &Process| process.pidfd().unwrap().try_clone_to_owned().unwrap();
        for child in &mut children {
            child.wait().unwrap();
        }
        assert!(Process::from_pidfd(one.identity(), keep(&one)).is_ok());
        if one.identity().inode.is_some() {
            let wrong = Process::from_pidfd(one.identity(), keep(&other));
            assert!(matches!(wrong, Err(OpenError::Gone { .. })));
        }
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

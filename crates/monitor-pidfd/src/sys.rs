//! Calls that nix does not wrap, or wraps in a way that loses what we need: the only unsafe code of
//! this crate.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use tokio::io::unix::AsyncFd;

/// `struct pidfd_info` of linux/pidfd.h, as of its first version (64 bytes, Linux 6.13).
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroup_id: u64,
    pid: u32,
    tgid: u32,
    ppid: u32,
    ruid: u32,
    rgid: u32,
    euid: u32,
    egid: u32,
    suid: u32,
    sgid: u32,
    fsuid: u32,
    fsgid: u32,
    exit_code: i32,
}

const _: () = assert!(
    size_of::<PidfdInfo>() == 64,
    "the size is part of the ioctl's number"
);

/// The exit code is asked for, and in the answer: it is there (Linux 6.15).
const PIDFD_INFO_EXIT: u64 = 1 << 3;

nix::ioctl_readwrite!(pidfd_get_info, 0xFF, 11, PidfdInfo);

/// Makes a non-blocking descriptor fit for waiting on it. Needs a tokio runtime.
pub(crate) fn register(file: File) -> io::Result<AsyncFd<File>> {
    // SAFETY: a `File` owns its descriptor and has the same one all its life.
    unsafe { AsyncFd::register(file) }.map_err(|error| error.into_parts().1)
}

/// The wait status of a reaped process; `None` if it is not reaped or the kernel does not keep it.
pub(crate) fn exit_info(pidfd: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    let mut info = PidfdInfo {
        mask: PIDFD_INFO_EXIT,
        ..PidfdInfo::default()
    };
    // SAFETY: the number encodes the size of PidfdInfo, which lives through the call; the
    // descriptor is borrowed.
    let result = unsafe { pidfd_get_info(pidfd.as_raw_fd(), &raw mut info) };
    match result {
        Ok(_) => Ok((info.mask & PIDFD_INFO_EXIT != 0).then_some(info.exit_code)),
        // ENOTTY: before 6.13. ESRCH: reaped, and no information kept (before 6.15). EINVAL: an
        // unknown mask.
        Err(Errno::ENOTTY | Errno::ESRCH | Errno::EINVAL) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Which process to reap.
#[derive(Clone, Copy)]
pub(crate) enum Target<'a> {
    /// Since Linux 5.4; before, EINVAL.
    Pidfd(BorrowedFd<'a>),
    /// One that is known to be unreaped, or another process might be meant.
    Number(i32),
}

/// What becomes of a zombie whose status was read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Zombie {
    /// It stays, and tells the next caller the same.
    Stays,
    Reaped,
}

/// The wait status of our child that has ended; `None` if it has not, or is not our child.
///
/// Not nix's: that fails on a process killed by a real-time signal.
pub(crate) fn wait(target: Target<'_>, zombie: Zombie) -> io::Result<Option<i32>> {
    let mut flags = libc::WEXITED | libc::WNOHANG;
    if zombie == Zombie::Stays {
        flags |= libc::WNOWAIT;
    }
    let (kind, id) = match target {
        Target::Pidfd(pidfd) => (libc::P_PIDFD, pidfd.as_raw_fd()),
        Target::Number(pid) => (libc::P_PID, pid),
    };
    let id = libc::id_t::try_from(id).map_err(io::Error::other)?;
    loop {
        // SAFETY: siginfo_t is plain data for which all zeros are valid.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: waitid writes one siginfo_t, which lives through the call; a descriptor is
        // borrowed and so open.
        let result = unsafe { libc::waitid(kind, id, &raw mut info, flags) };
        if result == 0 {
            return Ok(wait_status(&info));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::ECHILD) => return Ok(None),
            _ => return Err(error),
        }
    }
}

/// The wait status as `waitpid` would give it.
fn wait_status(info: &libc::siginfo_t) -> Option<i32> {
    // SAFETY: waitid has filled in a child's fields, or left our zeros.
    let status = unsafe { info.si_status() };
    match info.si_code {
        libc::CLD_EXITED => Some((status & 0xff) << 8),
        libc::CLD_KILLED => Some(status & 0x7f),
        libc::CLD_DUMPED => Some((status & 0x7f) | 0x80),
        _ => None,
    }
}

/// A child that ends at once with this code, for probing. Its pid.
pub(crate) fn fork_and_exit(code: u8) -> io::Result<i32> {
    // SAFETY: the child calls nothing but _exit, which is async-signal-safe, so threads and locks
    // don't matter.
    match unsafe { libc::fork() } {
        // SAFETY: _exit is async-signal-safe and does not return.
        0 => unsafe { libc::_exit(i32::from(code)) },
        pid if pid > 0 => Ok(pid),
        _ => Err(io::Error::last_os_error()),
    }
}

//! System calls that no crate wraps safely: the only unsafe code of this crate, each block with its
//! reason.

use std::ffi::OsString;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Lets all threads have one heap, not up to eight for each processor, each of which keeps what is
/// freed in it. For the first steps, before there are other threads.
#[cfg(target_env = "gnu")]
pub(crate) fn use_one_heap() {
    // SAFETY: mallopt(3) with a number; no other thread allocates meanwhile.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Does nothing: other allocators have no such heaps.
#[cfg(not(target_env = "gnu"))]
pub(crate) fn use_one_heap() {}

/// Gives freed memory back to the system. Starting reads the kernel's type information (5 MB), and
/// glibc would keep that much of its heap for as long as the daemon runs.
#[cfg(target_env = "gnu")]
pub(crate) fn trim_heap() {
    // SAFETY: malloc_trim(3) has no preconditions and may be called from any thread at any time.
    unsafe { libc::malloc_trim(0) };
}

/// Does nothing: other allocators give memory back by themselves.
#[cfg(not(target_env = "gnu"))]
pub(crate) fn trim_heap() {}

/// Takes a variable out of the environment, so that no child ever sees it. Only for the first steps
/// of `main`, before any thread.
pub(crate) fn take_variable(name: &str) -> Option<OsString> {
    let value = std::env::var_os(name)?;
    // SAFETY: this process has one thread yet, so no other thread reads the environment.
    unsafe { std::env::remove_var(name) };
    Some(value)
}

/// Owns a descriptor that came to this process, with `execve` or in a message, and keeps it from
/// its children. Only for a number that the sender has named, and only once for each.
pub(crate) fn own(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers; a number that is not open is refused with EBADF.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, it was given to us, and the caller names it once: nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Lets the reactor wait until this descriptor is readable.
pub(crate) fn when_readable(descriptor: BorrowedFd<'_>) -> io::Result<AsyncFd<BorrowedFd<'_>>> {
    // SAFETY: a borrowed descriptor stays open under the same number as long as it is borrowed,
    // and the returned value borrows it.
    unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }
        .map_err(io::Error::from)
}

/// How the kernel schedules a thread: the first version of its `struct sched_attr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Scheduling {
    size: u32,
    pub(crate) policy: u32,
    pub(crate) flags: u64,
    pub(crate) nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// The size of [`Scheduling`], `SCHED_ATTR_SIZE_VER0`.
const SCHEDULING_SIZE: u32 = 48;

impl Scheduling {
    /// That of the calling thread.
    pub(crate) fn of_this_thread() -> io::Result<Self> {
        let mut found = Self::default();
        // SAFETY: the kernel writes at most the size that is named, which is that of the type.
        let result = unsafe {
            libc::syscall(
                libc::SYS_sched_getattr,
                0,
                &raw mut found,
                SCHEDULING_SIZE,
                0,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(found)
    }

    /// Gives it to the calling thread.
    pub(crate) fn give_to_this_thread(mut self) -> io::Result<()> {
        self.size = SCHEDULING_SIZE;
        // SAFETY: the kernel reads and writes at most the size that the first field names.
        let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw mut self, 0) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

//! What nix does not wrap safely: the only unsafe code of this crate, each block with its reason.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use tokio::io::unix::AsyncFd;

/// Owns a descriptor that the kernel has just installed for us (`SCM_RIGHTS`) and that nobody else knows.
pub(crate) fn own_received(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller got the number from a control message this moment; it is open and has no other owner.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Makes a non-blocking descriptor fit for waiting on it. Needs a tokio runtime.
pub(crate) fn register(file: File) -> io::Result<AsyncFd<File>> {
    // SAFETY: a `File` owns its descriptor and has the same one all its life.
    unsafe { AsyncFd::register(file) }.map_err(|error| error.into_parts().1)
}

/// Sets a terminal's size in characters.
pub(crate) fn set_window_size(terminal: BorrowedFd<'_>, width: u16, height: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: height,
        ws_col: width,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize, which lives through the call; the descriptor is borrowed and so open.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// The first of our zombies, not reaped. nix's `waitid` fails on one that a real-time signal has killed.
pub(crate) fn peek_zombie() -> io::Result<Option<i32>> {
    wait(libc::P_ALL, 0, libc::WNOWAIT)
}

/// Reaps this zombie, if it is one of ours.
pub(crate) fn reap_zombie(pid: i32) -> io::Result<Option<i32>> {
    wait(
        libc::P_PID,
        u32::try_from(pid).map_err(io::Error::other)?,
        0,
    )
}

fn wait(which: libc::idtype_t, id: libc::id_t, flags: libc::c_int) -> io::Result<Option<i32>> {
    // SAFETY: siginfo_t is plain data for which all zeros are valid.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: waitid writes one siginfo_t, which lives through the call.
    let result = unsafe {
        libc::waitid(
            which,
            id,
            &raw mut info,
            libc::WEXITED | libc::WNOHANG | flags,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: waitid succeeded, so the union holds a child's fields; pid 0, from our zeros, means there was none.
    let pid = unsafe { info.si_pid() };
    Ok((pid > 0).then_some(pid))
}

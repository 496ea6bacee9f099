//! The one system call that no wrapper has: a signal by number, for kernels without pidfds.
#![expect(unsafe_code, reason = "a system call that nix cannot express")]

use std::io;

/// Sends any signal, or none with 0. nix knows no real-time signals.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: plain numbers; no memory is touched.
    if unsafe { libc::kill(pid, signal) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

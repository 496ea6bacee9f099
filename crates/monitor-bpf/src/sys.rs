//! A child for proving that exits are recorded: the only unsafe code of this crate.

use std::io;

/// A child that does nothing until it is dropped, which kills and reaps it.
#[derive(Debug)]
pub(crate) struct Child(i32);

impl Child {
    /// Forks it.
    pub(crate) fn fork() -> io::Result<Self> {
        // With our table of descriptors, not a copy, which would keep open what we close.
        let flags = libc::c_long::from(libc::CLONE_FILES | libc::SIGCHLD);
        let parent = std::process::id();
        // SAFETY: without CLONE_VM, clone is a fork, and the zeros are read by no flag given. The
        // child calls only what is safe after the fork of a process with threads.
        match unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) } {
            0 => wait_for_the_end(parent),
            pid if pid > 0 => Ok(Self(i32::try_from(pid).map_err(io::Error::other)?)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Its number.
    pub(crate) fn pid(&self) -> i32 {
        self.0
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: plain numbers; the child is reaped below and nowhere else, so the number is its.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
        loop {
            // SAFETY: a null status is allowed; nothing that is waited for outlives a SIGKILL.
            let result = unsafe { libc::waitpid(self.0, std::ptr::null_mut(), libc::__WALL) };
            let error = io::Error::last_os_error();
            if result >= 0 || error.kind() != io::ErrorKind::Interrupted {
                return;
            }
        }
    }
}

fn wait_for_the_end(parent: u32) -> ! {
    // SAFETY: plain numbers.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    // SAFETY: getppid has no arguments and cannot fail.
    if unsafe { libc::getppid() }.unsigned_abs() != parent {
        // SAFETY: ends this process without running anything of the parent's.
        unsafe { libc::_exit(1) };
    }
    loop {
        // SAFETY: waits for a signal; touches no memory.
        unsafe { libc::pause() };
    }
}

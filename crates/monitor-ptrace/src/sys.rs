//! ptrace(2) and waitpid(2) as numbers: nix's wrappers have no LISTEN and no real-time signals. The
//! only unsafe code of this crate.

use std::io;
use std::sync::atomic::{AtomicI32, Ordering};

/// `PTRACE_EVENT_STOP`: a group-stop, or an interrupt.
pub(crate) const EVENT_STOP: i32 = libc::PTRACE_EVENT_STOP;

/// What a wait has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waited {
    /// It ended, with this wait status.
    Ended { pid: i32, status: i32 },
    /// It is stopped and wants to be continued.
    Stopped { pid: i32, signal: i32, event: i32 },
}

/// Attaches without stopping, and to all threads that it will have.
pub(crate) fn seize(tid: i32) -> io::Result<()> {
    let options = libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_TRACEEXEC;
    request(libc::PTRACE_SEIZE, tid, options)
}

/// Makes it stop, to be detached.
pub(crate) fn interrupt(tid: i32) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, 0)
}

/// Lets a stopped thread go on, with this signal or 0.
pub(crate) fn go_on(tid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_CONT, tid, signal)
}

/// Leaves a thread in its group-stop, and goes on listening for its end.
pub(crate) fn listen(tid: i32) -> io::Result<()> {
    request(libc::PTRACE_LISTEN, tid, 0)
}

/// Detaches from a stopped thread, with this signal or 0.
pub(crate) fn detach(tid: i32, signal: i32) -> io::Result<()> {
    request(libc::PTRACE_DETACH, tid, signal)
}

fn request(request: libc::c_uint, tid: i32, data: i32) -> io::Result<()> {
    let data = libc::c_long::from(data);
    // SAFETY: none of these requests reads or writes memory of this process: the address is unused,
    // the data is a number.
    let result = unsafe { libc::ptrace(request, tid, std::ptr::null_mut::<libc::c_void>(), data) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Waits for the next tracee or child of this thread. Those of other threads stay unreaped.
pub(crate) fn wait() -> io::Result<Waited> {
    let mut status = 0;
    let flags = libc::__WALL | libc::__WNOTHREAD | libc::WUNTRACED;
    loop {
        // SAFETY: waitpid writes one int, which lives through the call.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, flags) };
        if pid > 0 {
            return Ok(if libc::WIFSTOPPED(status) {
                Waited::Stopped {
                    pid,
                    signal: libc::WSTOPSIG(status),
                    event: status >> 16,
                }
            } else {
                Waited::Ended { pid, status }
            });
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// A child of the tracer thread that does nothing but stop when it is told to: what wakes a thread
/// that waits for processes.
#[derive(Debug, Default)]
pub(crate) struct Bell(AtomicI32);

impl Bell {
    /// Starts it, from the thread that is to be woken. It ends with that thread.
    pub(crate) fn hang(&self) -> io::Result<()> {
        // With our table of descriptors, not a copy: a copy would keep open what we close, and a
        // reader of the other end of such a pipe would wait for its end as long as the bell hangs.
        let flags = libc::CLONE_FILES | libc::SIGCHLD;
        let parent = std::process::id();
        // SAFETY: without CLONE_VM, clone is a fork, and the zeros are read by no flag given. The
        // child calls only what is safe after the fork of a process with threads.
        match unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags), 0, 0, 0, 0) } {
            0 => be_a_bell(parent),
            pid if pid > 0 => {
                let pid = i32::try_from(pid).map_err(io::Error::other)?;
                self.0.store(pid, Ordering::SeqCst);
                Ok(())
            }
            _ => Err(io::Error::last_os_error()),
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.0.load(Ordering::SeqCst)
    }

    /// Wakes the thread.
    pub(crate) fn ring(&self) {
        self.signal(libc::SIGSTOP);
    }

    /// Makes it ready to ring again.
    pub(crate) fn reset(&self) {
        self.signal(libc::SIGCONT);
    }

    /// Ends it, from the thread that it wakes.
    pub(crate) fn take_down(&self) {
        self.signal(libc::SIGKILL);
        let pid = self.0.swap(0, Ordering::SeqCst);
        if pid > 0 {
            // SAFETY: a null status is allowed; the number is our own unreaped child's.
            unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL) };
        }
    }

    fn signal(&self, signal: i32) {
        let pid = self.pid();
        if pid > 0 {
            // SAFETY: plain numbers; the child is reaped by `take_down` only, after which the
            // number is 0.
            unsafe { libc::kill(pid, signal) };
        }
    }
}

fn be_a_bell(parent: u32) -> ! {
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

/// A child for probing that waits to be killed.
pub(crate) fn fork_and_pause() -> io::Result<i32> {
    let bell = Bell::default();
    bell.hang()?;
    Ok(bell.pid())
}

/// Kills and reaps such a child; its wait status.
pub(crate) fn kill_and_reap(pid: i32) -> io::Result<i32> {
    let mut status = 0;
    // SAFETY: plain numbers; our own unreaped child.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    // SAFETY: waitpid writes one int, which lives through the call.
    if unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(status)
}

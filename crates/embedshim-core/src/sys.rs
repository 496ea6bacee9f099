//! What nix does not wrap safely: the only unsafe code of this crate, each block with its reason.

use std::ffi::CString;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::Mode;
use rustix::fs::OFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::fdstore::StreamFd;

/// Owns a descriptor that the kernel has just installed for us (`SCM_RIGHTS`, an ioctl) and that
/// nothing else knows.
pub(crate) fn own_received(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller got the number from the kernel this moment; it is open and has no other
    // owner.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// What a child sets between `fork` and `execve`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BeforeExec {
    pub(crate) open_files: Option<(u64, u64)>,
    pub(crate) oom_score_adj: Option<i32>,
    pub(crate) umask: Option<u32>,
}

/// Lets the child do this. What it may not do stays as it is. A command with such a step is started
/// by `fork`, not by `posix_spawn(3)`: children of glibc's ignore signal 32 for all their lives,
/// and so do theirs, as this daemon does that its keeper has started. Here it gets its default
/// again.
///
/// It leads a session, and with that a process group, so the command must not ask for one: in the
/// daemon's session the kernel would send SIGHUP to a group with a stopped process when the daemon
/// dies.
pub(crate) fn before_exec(command: &mut Command, what: &BeforeExec) {
    let BeforeExec {
        open_files,
        oom_score_adj,
        umask,
    } = *what;
    let score = oom_score_adj.map(|score| score.to_string());
    let step = move || {
        default_signal(SIGCANCEL);
        nix::unistd::setsid()?;
        if let Some((soft, hard)) = open_files {
            set_open_files(soft, hard);
        }
        if let Some(score) = &score {
            set_oom_score(score);
        }
        if let Some(mask) = umask {
            nix::sys::stat::umask(Mode::from_bits_truncate(mask));
        }
        Ok(())
    };
    // SAFETY: the step makes system calls alone, which are safe after `fork` of a process with
    // threads; what it needs was allocated before.
    unsafe { command.pre_exec(step) };
}

/// Lets the child make this file, empty, before it becomes the program: whether it is there says
/// whether the program was ever called. A child that cannot make it is not started.
pub(crate) fn mark_exec(command: &mut Command, mark: CString) {
    let step = move || {
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_CLOEXEC;
        let flags = nix::fcntl::OFlag::from_bits_retain(flags);
        nix::fcntl::open(mark.as_c_str(), flags, Mode::S_IRUSR)?;
        Ok(())
    };
    // SAFETY: the step makes one system call alone, which is safe after `fork` of a process with
    // threads; the path was allocated before.
    unsafe { command.pre_exec(step) };
}

/// Lets the child write its `/proc/self/stat` into this file before it becomes the program: its
/// number and its start time say which process that is. A child that cannot write it is not
/// started.
pub(crate) fn note_self(command: &mut Command, file: CString) {
    let step = move || {
        let read = nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_CLOEXEC;
        let stat = nix::fcntl::open(c"/proc/self/stat", read, Mode::empty())?;
        let mut buffer = [0; 1024];
        let length = nix::unistd::read(&stat, &mut buffer)?;
        let write = nix::fcntl::OFlag::O_WRONLY | nix::fcntl::OFlag::O_CLOEXEC;
        let new = nix::fcntl::OFlag::O_CREAT | nix::fcntl::OFlag::O_TRUNC;
        let note = nix::fcntl::open(file.as_c_str(), write | new, Mode::S_IRUSR)?;
        nix::unistd::write(&note, buffer.get(..length).unwrap_or_default())?;
        Ok(())
    };
    // SAFETY: the step makes system calls alone, which are safe after `fork` of a process with
    // threads; the path was allocated before, and the buffer is on the stack.
    unsafe { command.pre_exec(step) };
}

/// glibc's own, for `pthread_cancel(3)`; its `sigaction` refuses it.
const SIGCANCEL: libc::c_long = 32;

/// Gives a signal its default action. Allocates nothing.
fn default_signal(signal: libc::c_long) {
    // The kernel's `struct sigaction`: handler, flags, restorer and an 8 byte mask; all zero is
    // SIG_DFL.
    let action = [0_u64; 4];
    // SAFETY: the kernel reads one structure of 32 bytes, which `action` is, and writes nothing.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            action.as_ptr(),
            std::ptr::null::<u64>(),
            size_of::<u64>(),
        )
    };
}

/// Where a child may not have so high a hard limit, it has its parent's. Allocates nothing.
fn set_open_files(soft: u64, hard: u64) {
    if setrlimit(Resource::RLIMIT_NOFILE, soft, hard).is_err()
        && let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, soft.min(hard), hard);
    }
}

/// Lowering it takes `CAP_SYS_RESOURCE`. Allocates nothing.
fn set_oom_score(score: &str) {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    if let Ok(file) = rustix::fs::open(
        c"/proc/self/oom_score_adj",
        flags,
        rustix::fs::Mode::empty(),
    ) {
        let _ = rustix::io::write(file, score.as_bytes());
    }
}

/// Makes a non-blocking descriptor fit for waiting on it. Needs a tokio runtime.
pub(crate) fn register(fd: Arc<OwnedFd>, interest: Interest) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: the `Arc` keeps the descriptor open, and an `OwnedFd` has the same one all its life.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(|error| error.into_parts().1)
}

/// The same for an end of a stream.
pub(crate) fn register_stream(fd: StreamFd, interest: Interest) -> io::Result<AsyncFd<StreamFd>> {
    // SAFETY: a `StreamFd` keeps its descriptor open while there is a clone of it, under the same
    // number.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(|error| error.into_parts().1)
}

/// Sets a terminal's size in characters.
pub(crate) fn set_window_size(terminal: BorrowedFd<'_>, width: u16, height: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: height,
        ws_col: width,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize, which lives through the call; the descriptor is
    // borrowed and so open.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// `fork` with more flags of clone(2), whose child has no exit signal: its end is seen by
/// [`wait_unseen`] alone, and by no reaper of whatever child has ended. Returns twice, with 0 in
/// the child.
///
/// # Safety
///
/// The child may do no more than what is safe after the fork of a process with threads, and must
/// not return from its caller.
pub(crate) unsafe fn fork_unseen(flags: libc::c_int) -> io::Result<libc::pid_t> {
    // Not clone3: kernels before 5.3 and many seccomp filters refuse it. The lowest byte of the
    // flags is the exit signal, none.
    let flags = libc::c_ulong::try_from(flags).map_err(io::Error::other)?;
    let none: libc::c_ulong = 0;
    // SAFETY: without CLONE_VM and a stack it returns twice, as fork does, and the caller keeps its
    // promise about the child.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    libc::pid_t::try_from(pid).map_err(io::Error::other)
}

/// The wait status of such a child. Blocks until it has ended.
pub(crate) fn wait_unseen(child: libc::pid_t) -> io::Result<libc::c_int> {
    let mut status = 0;
    loop {
        // SAFETY: the status lives through the call. __WALL because it has no exit signal.
        let waited = unsafe { libc::waitpid(child, &raw mut status, libc::__WALL) };
        if waited == child {
            return Ok(status);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// The first of our zombies, not reaped. nix's `waitid` fails on one that a real-time signal has
/// killed.
pub(crate) fn peek_zombie() -> io::Result<Option<i32>> {
    wait(libc::P_ALL, 0, libc::WNOWAIT)
}

/// Reaps this zombie, if it is a child of this process.
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
    // SAFETY: waitid succeeded, so the union holds a child's fields; pid 0, from our zeros, means
    // there was none.
    let pid = unsafe { info.si_pid() };
    Ok((pid > 0).then_some(pid))
}

/// `struct loop_info64` of linux/loop.h; only the flags and the name are used.
#[repr(C)]
struct LoopInfo {
    numbers: [u64; 5],
    number: u32,
    encryption: [u32; 2],
    flags: u32,
    file_name: [u8; 64],
    encryption_name: [u8; 64],
    encryption_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    file: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopConfig>() == 304, "the kernel's layout");

/// The number of a loop device that is not in use, from `/dev/loop-control`.
pub(crate) fn free_loop_device(control: BorrowedFd<'_>) -> io::Result<u32> {
    const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
    // SAFETY: LOOP_CTL_GET_FREE takes no argument; the descriptor is borrowed and so open.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    u32::try_from(number).map_err(|_| io::Error::last_os_error())
}

/// Puts a file behind a loop device (`LOOP_CONFIGURE`, Linux 5.8). `flags` are `LO_FLAGS_*`.
pub(crate) fn configure_loop_device(
    device: BorrowedFd<'_>,
    file: BorrowedFd<'_>,
    flags: u32,
) -> io::Result<()> {
    const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
    let config = LoopConfig {
        file: u32::try_from(file.as_raw_fd()).map_err(io::Error::other)?,
        block_size: 0,
        info: LoopInfo {
            numbers: [0; 5],
            number: 0,
            encryption: [0; 2],
            flags,
            file_name: [0; 64],
            encryption_name: [0; 64],
            encryption_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    };
    // SAFETY: LOOP_CONFIGURE reads one loop_config, which lives through the call; both descriptors
    // are borrowed and so open.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Maps the owners of a detached mount's files as `user_namespace` maps ids (`MOUNT_ATTR_IDMAP`,
/// Linux 5.12).
pub(crate) fn map_owners(mount: BorrowedFd<'_>, user_namespace: BorrowedFd<'_>) -> io::Result<()> {
    const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;
    /// `struct mount_attr` of linux/mount.h, its first version.
    #[repr(C)]
    struct MountAttributes {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    let attributes = MountAttributes {
        set: MOUNT_ATTR_IDMAP,
        clear: 0,
        propagation: 0,
        user_namespace: u64::try_from(user_namespace.as_raw_fd()).map_err(io::Error::other)?,
    };
    // SAFETY: mount_setattr reads a C string and one mount_attr of the size given, which live
    // through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// A child that does nothing in a user namespace of its own, until this is dropped.
pub(crate) struct NamespaceHolder(libc::pid_t);

impl NamespaceHolder {
    /// Starts it. A namespace without mappings: a caller that needs them writes them to
    /// `/proc/PID/uid_map` and `gid_map`.
    pub(crate) fn start() -> io::Result<Self> {
        // With our table of descriptors, not a copy: no pipe stays open for the moment it lives.
        let flags = libc::CLONE_NEWUSER | libc::CLONE_FILES;
        let parent = std::process::id();
        // SAFETY: the child makes system calls only, and ends without a destructor or handler.
        match unsafe { fork_unseen(flags) }? {
            0 => wait_for_the_end(parent),
            pid => Ok(Self(pid)),
        }
    }

    pub(crate) fn pid(&self) -> libc::pid_t {
        self.0
    }
}

/// In the child: only calls that are safe after the fork of a process with threads.
fn wait_for_the_end(parent: u32) -> ! {
    // SAFETY: prctl with plain numbers; it touches no memory.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    // SAFETY: getppid has no arguments and cannot fail.
    let is_alone = unsafe { libc::getppid() }.unsigned_abs() != parent;
    if is_alone {
        // SAFETY: ends this process without running anything of the parent's.
        unsafe { libc::_exit(1) };
    }
    loop {
        // SAFETY: waits for a signal; touches no memory.
        unsafe { libc::pause() };
    }
}

impl Drop for NamespaceHolder {
    fn drop(&mut self) {
        // SAFETY: our own child, not reaped yet: the number cannot be another process's.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
        // It fails for one that was waited for already, and nothing can have.
        let _ = wait_unseen(self.0);
    }
}

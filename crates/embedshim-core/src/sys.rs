//! What nix does not wrap safely: the only unsafe code of this crate, each block with its reason.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::fdstore::StreamFd;

/// Owns a descriptor that the kernel has just installed for us (`SCM_RIGHTS`) and that nobody else knows.
pub(crate) fn own_received(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller got the number from a control message this moment; it is open and has no other owner.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Makes a non-blocking descriptor fit for waiting on it. Needs a tokio runtime.
pub(crate) fn register(fd: Arc<OwnedFd>, interest: Interest) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: the `Arc` keeps the descriptor open, and an `OwnedFd` has the same one all its life.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(|error| error.into_parts().1)
}

/// The same for an end of a stream.
pub(crate) fn register_stream(fd: StreamFd, interest: Interest) -> io::Result<AsyncFd<StreamFd>> {
    // SAFETY: a `StreamFd` keeps its descriptor open while there is a clone of it, under the same number.
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
    // SAFETY: TIOCSWINSZ reads one winsize, which lives through the call; the descriptor is borrowed and so open.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Sends any signal, or none with 0. nix knows no real-time signals.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: plain numbers; no memory is touched.
    if unsafe { libc::kill(pid, signal) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
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

/// The number of a loop device that nobody uses, from `/dev/loop-control`.
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
    // SAFETY: LOOP_CONFIGURE reads one loop_config, which lives through the call; both descriptors are borrowed and so open.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Maps the owners of a detached mount's files as `user_namespace` maps ids (`MOUNT_ATTR_IDMAP`, Linux 5.12).
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
    // SAFETY: mount_setattr reads a C string and one mount_attr of the size given, which live through the call.
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

/// A process of ours that does nothing in a user namespace of its own, until this is dropped.
pub(crate) struct NamespaceHolder(libc::pid_t);

impl NamespaceHolder {
    /// Starts it. A namespace without mappings: whoever needs them writes them to `/proc/PID/uid_map` and `gid_map`.
    pub(crate) fn start() -> io::Result<Self> {
        /// `struct clone_args` of linux/sched.h, its first version.
        #[repr(C)]
        #[derive(Default)]
        struct CloneArguments {
            flags: u64,
            unused: [u64; 3],
            exit_signal: u64,
            stack: [u64; 3],
        }
        // With our table of descriptors, not a copy: no pipe stays open for the moment it lives. No exit signal: nobody
        // but `drop` sees it end.
        let flags = libc::CLONE_NEWUSER | libc::CLONE_FILES;
        let arguments = CloneArguments {
            flags: u64::try_from(flags).map_err(io::Error::other)?,
            ..CloneArguments::default()
        };
        let parent = std::process::id();
        // SAFETY: clone3 reads one clone_args of the size given; without CLONE_VM and a stack it returns twice, as fork does.
        let pid = unsafe {
            libc::syscall(
                libc::SYS_clone3,
                &raw const arguments,
                size_of::<CloneArguments>(),
            )
        };
        match pid {
            0 => wait_for_the_end(parent),
            pid if pid < 0 => Err(io::Error::last_os_error()),
            pid => libc::pid_t::try_from(pid)
                .map(Self)
                .map_err(io::Error::other),
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
        loop {
            // SAFETY: a null status is allowed; __WALL because it has no exit signal.
            let result = unsafe { libc::waitpid(self.0, std::ptr::null_mut(), libc::__WALL) };
            let again =
                result < 0 && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted;
            if !again {
                return;
            }
        }
    }
}

//! The init process of a pod whose containers share their processes, the only process that the
//! daemon starts for a sandbox. Owns what it is made of ([`Base`]), and its end. It has no right
//! and nothing to read: a container that traces it or looks behind `/proc/1` finds an empty file
//! system.

mod child;
mod plan;
mod program;
mod sys;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use exit_monitor::process::{OpenError, Process, ProcessIdentity};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, pivot_root};
use tokio::io::Interest;

pub(super) use child::Child;
pub(super) use plan::{Init, Plan};

use crate::cgroup::{Cgroup, home};
use crate::failpoint;
use crate::id::SandboxKey;
use crate::sandbox::error::{SandboxError, failed};
use crate::sandbox::record::Init as InitRecord;

/// How long the kernel may take to end it and what shares its pid namespace.
const END: Duration = Duration::from_secs(5);
/// How often it is looked at where the kernel has no pidfds.
const PAUSE: Duration = Duration::from_millis(5);
/// The same by what only waits for it.
const LOOK: Duration = Duration::from_secs(1);
/// As the CRI's own controller gives: of a node's processes it is one of the last to be killed for
/// memory.
const OOM_SCORE: &str = "-998";
/// How its file system is mounted.
const EMPTY: MsFlags = MsFlags::MS_RDONLY
    .union(MsFlags::MS_NOSUID)
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// What every pod's init process is made of. One for all of them.
#[derive(Debug)]
pub(super) struct Base {
    mounts: OwnedFd,
    program: OwnedFd,
}

impl Base {
    /// Makes it; `stage` is any directory. `Unsupported` on a processor that there is no program
    /// for. Blocks.
    pub(super) fn make(stage: &Path) -> io::Result<Self> {
        let program = program::file()?.ok_or_else(|| {
            let why = "shared processes need x86-64 or arm64: elsewhere there is no program";
            io::Error::new(io::ErrorKind::Unsupported, why)
        })?;
        Ok(Self {
            mounts: empty_mounts(stage, program.as_fd())?,
            program,
        })
    }

    /// An init process that becomes this user and group.
    pub(super) fn init(&self, ids: (u32, u32)) -> Init<'_> {
        Init {
            mounts: self.mounts.as_fd(),
            program: self.program.as_fd(),
            ids,
        }
    }
}

/// A mount namespace with nothing but an empty file system that is read-only; empty but for a name
/// of the program, where it needs one.
fn empty_mounts(stage: &Path, program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let (stage, program) = (stage.to_owned(), program.as_raw_fd());
    // A thread of its own: it has lost the host's file system afterwards.
    let thread = std::thread::Builder::new().name("sandbox".into());
    let thread = thread.spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        // While there is a procfs.
        let made = File::open("/proc/thread-self/ns/mnt")?;
        let none = None::<&str>;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(none, "/", none, private, none)?;
        let needs_name = has_tomoyo(&stage);
        let (options, first) = if needs_name {
            ("mode=555,size=4k,nr_inodes=6", EMPTY - MsFlags::MS_RDONLY)
        } else {
            ("mode=555,size=4k,nr_inodes=2", EMPTY)
        };
        mount(Some("tmpfs"), &stage, Some("tmpfs"), first, Some(options))?;
        if needs_name {
            let names = stage.join("dev/fd");
            fs::create_dir_all(&names)?;
            File::create(names.join(program.to_string()))?;
            mount(none, &stage, none, EMPTY | MsFlags::MS_REMOUNT, none)?;
        }
        chdir(&stage)?;
        pivot_root(".", ".")?;
        umount2(".", MntFlags::MNT_DETACH)?;
        Ok(made.into())
    })?;
    let joined = thread.join();
    joined.unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
}

/// Whether TOMOYO is active, as in Debian 11: it resolves the name `/dev/fd/N` that the kernel
/// gives to a program without one, and refuses its execution if that leads nowhere. Mounts and
/// unmounts; for a mount namespace of its own.
fn has_tomoyo(stage: &Path) -> bool {
    let (none, flags) = (None::<&str>, MsFlags::empty());
    if mount(none, stage, Some("securityfs"), flags, none).is_err() {
        return false;
    }
    let is_there = stage.join("tomoyo").exists();
    let _ = umount2(stage, MntFlags::MNT_DETACH);
    is_there
}

/// Makes a process of the node's the pod's: its cgroup and its score for the OOM killer. Neither is
/// worth a failure. Blocks.
pub(super) fn settle(pid: i32, cgroup: &Path) {
    home::settle(cgroup, pid);
    let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), OOM_SCORE);
}

/// Ends it, if there is one, and with it everything in its pid namespace, and removes its cgroup.
/// Repeatable. Blocks.
pub(super) fn end(key: &SandboxKey, init: Option<&InitRecord>) -> Result<(), SandboxError> {
    let Some(InitRecord { identity, cgroup }) = init else {
        return Ok(());
    };
    failpoint::step("before the init process of a sandbox is ended");
    let ended = kill(*identity).and_then(|()| Cgroup::remove_left(cgroup));
    let doing = "cannot end the init process of";
    ended.map_err(failed::<io::Error>(key, doing, cgroup))
}

fn kill(identity: ProcessIdentity) -> io::Result<()> {
    match Process::reopen(identity) {
        Ok(process) => {
            match process.signal(libc::SIGKILL) {
                // Reaped this moment.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
                killed => killed?,
            }
            wait_for_end(&process)?;
        }
        Err(OpenError::Gone { .. }) => {}
        Err(error) => return Err(io::Error::other(error)),
    }
    Ok(())
}

/// Waits for its end, for a bounded time. Blocks.
fn wait_for_end(process: &Process) -> io::Result<()> {
    let give_up = Instant::now() + END;
    while !process.has_ended()? {
        let left = give_up.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let pid = process.identity().pid;
            let why = format!("process {pid} does not end");
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        let Some(pidfd) = process.pidfd() else {
            std::thread::sleep(PAUSE);
            continue;
        };
        let mut polled = [PollFd::new(pidfd, PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut polled, limit) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Waits for its end. Needs a tokio runtime.
pub(super) async fn ended(identity: ProcessIdentity) -> io::Result<()> {
    let reopen = move || Process::reopen(identity);
    let process = match tokio::task::spawn_blocking(reopen).await? {
        Err(OpenError::Gone { .. }) => return Ok(()),
        reopened => reopened.map_err(io::Error::other)?,
    };
    if let Some(pidfd) = process.pidfd() {
        let pidfd = Arc::new(pidfd.try_clone_to_owned()?);
        let pidfd = crate::sys::register(pidfd, Interest::READABLE)?;
        return pidfd.readable().await.map(|_| ());
    }
    while !process.has_ended()? {
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// The user namespace that this namespace belongs to; an error if it is the node's own.
pub(super) fn owner_of(namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let owner = sys::owner_of(namespace)?;
    let own = nix::sys::stat::stat("/proc/self/ns/user")?;
    if nix::sys::stat::fstat(&owner)?.st_ino == own.st_ino {
        return Err(io::Error::other("it is of the node's user namespace"));
    }
    Ok(owner)
}

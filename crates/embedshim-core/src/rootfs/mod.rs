//! Root filesystems: mounting what containerd asks for and unmounting it without a trace. Owns
//! containerd's option language; never decides what is mounted. All functions block on the file
//! system.

mod helper;
mod idmap;
mod loop_device;
mod lowerdirs;
mod mount;
mod options;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sys::stat::Mode;

use crate::mountinfo::{MountPoint, read_mountinfo};
pub(crate) use helper::{HelperContext, end_left};
use loop_device::LoopDevice;
pub use mount::{Mount, MountError};
use options::Options;

/// How long a busy mount may stay busy before the unmount is given up.
const BUSY: Duration = Duration::from_secs(1);
const BUSY_PAUSE: Duration = Duration::from_millis(50);

#[cfg(fuzzing)]
pub(crate) fn options_are_understood(mount: &Mount, target: &Path) -> bool {
    Options::parse(mount, target).is_ok()
}

/// Mounts all of `mounts` in order on (or below) `rootfs`, which is made if it is missing. On
/// failure, what this call mounted is unmounted again.
pub(crate) fn mount_all(
    mounts: &[Mount],
    rootfs: &Path,
    context: &HelperContext,
) -> Result<(), MountError> {
    make_rootfs(rootfs)?;
    let mut done: Vec<PathBuf> = Vec::new();
    for mount in mounts {
        match mount_one(mount, rootfs, context) {
            Ok(target) => done.push(target),
            Err(error) => {
                for target in done.iter().rev() {
                    // The first failure is the one to report.
                    let _ = unmount(target);
                }
                return Err(error);
            }
        }
    }
    Ok(())
}

fn make_rootfs(rootfs: &Path) -> Result<(), MountError> {
    // 0711 as containerd's own NewBundle: a remapped root must be able to pass.
    match std::fs::DirBuilder::new().mode(0o711).create(rootfs) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(MountError::Target {
            doing: "make",
            target: rootfs.to_owned(),
            source: e,
        }),
        _ => Ok(()),
    }
}

fn mount_one(mount: &Mount, rootfs: &Path, context: &HelperContext) -> Result<PathBuf, MountError> {
    let target = target_below(rootfs, &mount.target)?;
    let refused = |source: io::Error| MountError::Mount {
        kind: mount.kind.clone(),
        from: mount.source.clone(),
        target: target.shown.clone(),
        source,
    };
    if let Some((program, name)) = helper::of(&mount.kind) {
        helper::mount(program, name, mount, &target.shown, context).map_err(refused)?;
        return Ok(target.shown);
    }
    let options = Options::parse(mount, &target.shown)?;
    attach(mount, &options, &target).map_err(refused)?;
    if let Err(errno) = finish(&options, &target.shown) {
        let flags = MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH;
        // Why it could not be finished is what matters.
        let _ = umount2(&target.shown, flags);
        return Err(refused(errno.into()));
    }
    Ok(target.shown)
}

fn attach(mount: &Mount, options: &Options, target: &Target) -> io::Result<()> {
    if let Some(map) = &options.idmap {
        let detached = if mount.kind == "overlay" {
            idmap::overlay(options.flags, &options.data, map, &target.shown)?
        } else {
            let recursive = options.flags.contains(MsFlags::MS_REC);
            idmap::bind(Path::new(&mount.source), recursive, map)?
        };
        return idmap::attach(&detached, &target.path);
    }
    let device = options
        .is_loop
        .then(|| LoopDevice::of(&mount.source, options.flags.contains(MsFlags::MS_RDONLY)))
        .transpose()?;
    let source = device
        .as_ref()
        .map_or(Path::new(&mount.source), |device| &device.path);
    let data = (!options.data.is_empty()).then_some(options.data.as_str());
    let call = || {
        let kind = Some(mount.kind.as_str());
        nix::mount::mount(Some(source), &target.path, kind, options.flags, data)
    };
    Ok(match &options.base {
        None => call(),
        Some(base) => lowerdirs::inside(base, call),
    }?)
}

/// What takes calls of its own once something is mounted.
fn finish(options: &Options, target: &Path) -> Result<(), Errno> {
    let change = |flags| nix::mount::mount(None::<&str>, target, None::<&str>, flags, None::<&str>);
    // A bind mount takes its source's flags; only a second call can make it read-only.
    if options.flags.contains(MsFlags::MS_BIND) && options.needs_remount() {
        change(options.flags | MsFlags::MS_REMOUNT)?;
    }
    options
        .propagation
        .iter()
        .try_for_each(|&propagation| change(propagation))
}

/// A mount point: the path to mount on, and the path to show and to unmount.
struct Target {
    /// Through a descriptor where symlinks had to be resolved inside the rootfs: nothing can be
    /// swapped after the check.
    path: PathBuf,
    shown: PathBuf,
    _descriptor: Option<OwnedFd>,
}

/// `target` inside `rootfs`; a symlink in it is followed as if `rootfs` were the root (Linux 5.6).
fn target_below(rootfs: &Path, target: &str) -> Result<Target, MountError> {
    if target.is_empty() {
        return Ok(Target {
            path: rootfs.to_owned(),
            shown: rootfs.to_owned(),
            _descriptor: None,
        });
    }
    let shown = rootfs.join(target.trim_start_matches('/'));
    let failed = |errno: Errno| MountError::Target {
        doing: "open",
        target: shown.clone(),
        source: errno.into(),
    };
    let root = open(
        rootfs,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .map_err(failed)?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT);
    let descriptor = openat2(&root, target, how).map_err(failed)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()));
    let shown = std::fs::read_link(&path).unwrap_or_else(|_| shown.clone());
    Ok(Target {
        path,
        shown,
        _descriptor: Some(descriptor),
    })
}

/// Unmounts everything at and below `target`, the latest first. What is not there is unmounted
/// already.
pub fn unmount_recursive(target: &Path) -> Result<(), MountError> {
    // Nearly always there is one mount and nothing below it. The kernel's list of all mounts is
    // long, and only needed for more than that.
    if is_unmounted_alone(target) {
        return Ok(());
    }
    let mut mounts: Vec<MountPoint> = read_mountinfo()
        .map_err(MountError::MountInfo)?
        .into_iter()
        .filter(|mount| mount.path.starts_with(target))
        .collect();
    // Later mounts lie over earlier ones: the reverse of the kernel's order takes the top one
    // first.
    while let Some(mount) = mounts.pop() {
        unmount(&mount.path)?;
    }
    Ok(())
}

/// Unmounts what is mounted at `target` itself. Whether nothing can be mounted below it then: what
/// is left is the empty directory that it was mounted on, or nothing.
fn is_unmounted_alone(target: &Path) -> bool {
    loop {
        match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            // Another may be below it.
            Ok(()) | Err(Errno::EINTR) => {}
            Err(Errno::ENOENT) => return true,
            // It is no mount point (any more).
            Err(Errno::EINVAL) => {
                let mut entries = std::fs::read_dir(target).into_iter().flatten();
                return target.is_dir() && entries.next().is_none();
            }
            Err(_) => return false,
        }
    }
}

fn unmount(target: &Path) -> Result<(), MountError> {
    let give_up = Instant::now() + BUSY;
    loop {
        match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(Errno::EBUSY) if Instant::now() < give_up => std::thread::sleep(BUSY_PAUSE),
            Err(errno) => {
                return Err(MountError::Unmount {
                    target: target.to_owned(),
                    source: errno.into(),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests;

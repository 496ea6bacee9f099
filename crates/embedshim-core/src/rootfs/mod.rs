//! Root filesystems: mounting what containerd asks for and unmounting it without a trace.
//! Owns containerd's option language; never decides what is mounted. All functions block on the file system.

mod lowerdirs;
mod mountinfo;
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
use serde::{Deserialize, Serialize};

pub(crate) use mountinfo::{MountPoint, read_mountinfo};
use options::Options;

/// How long a busy mount may stay busy before the unmount is given up.
const BUSY: Duration = Duration::from_secs(1);
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// One mount as containerd describes it (`containerd.types.Mount`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// `bind`, `overlay`, `tmpfs` ...
    #[serde(rename = "type")]
    pub kind: String,
    /// What to mount.
    pub source: String,
    /// Where, below the rootfs; empty for the rootfs itself.
    #[serde(default)]
    pub target: String,
    /// fstab-style options.
    pub options: Vec<String>,
}

/// Why a rootfs could not be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    /// An option of containerd's that is not ours to interpret, or not yet.
    #[error("mount option {option:?} of {kind} on {target} is not supported{why}", target = .target.display())]
    Unsupported {
        /// The option.
        option: String,
        /// The file-system type.
        kind: String,
        /// Where.
        target: PathBuf,
        /// What else there is to say.
        why: &'static str,
    },
    /// The options are longer than mount(2) takes.
    #[error("the options of {kind} on {target} are {length} bytes long, mount takes {limit}", target = .target.display())]
    OptionsTooLong {
        /// The file-system type.
        kind: String,
        /// Where.
        target: PathBuf,
        /// How long they are.
        length: usize,
        /// How long they may be.
        limit: usize,
    },
    /// A directory to mount on.
    #[error("cannot {doing} mount point {target}", target = .target.display())]
    Target {
        /// "make" or "open".
        doing: &'static str,
        /// Which.
        target: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// mount(2) refused.
    #[error("cannot mount {kind} {from} on {target}", target = .target.display())]
    Mount {
        /// The file-system type.
        kind: String,
        /// The source.
        from: String,
        /// Where.
        target: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// umount2(2) refused. The text is runc-v2's.
    #[error("failed rootfs umount: {target}", target = .target.display())]
    Unmount {
        /// Where.
        target: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel's list of mounts cannot be read.
    #[error("cannot read /proc/self/mountinfo")]
    MountInfo(#[source] io::Error),
}

/// Mounts all of `mounts` in order on (or below) `rootfs`, which is made if it is missing. On failure, what this call
/// mounted is unmounted again.
pub fn mount_all(mounts: &[Mount], rootfs: &Path) -> Result<(), MountError> {
    make_rootfs(rootfs)?;
    let mut done: Vec<PathBuf> = Vec::new();
    for mount in mounts {
        match mount_one(mount, rootfs) {
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

fn mount_one(mount: &Mount, rootfs: &Path) -> Result<PathBuf, MountError> {
    let target = target_below(rootfs, &mount.target)?;
    let options = Options::parse(mount, &target.shown)?;
    let refused = |source: Errno| MountError::Mount {
        kind: mount.kind.clone(),
        from: mount.source.clone(),
        target: target.shown.clone(),
        source: source.into(),
    };
    let call = |flags: MsFlags, data: Option<&str>| {
        nix::mount::mount(
            Some(mount.source.as_str()),
            &target.path,
            Some(mount.kind.as_str()),
            flags,
            data,
        )
    };
    let data = (!options.data.is_empty()).then_some(options.data.as_str());
    match &options.base {
        None => call(options.flags, data),
        Some(base) => lowerdirs::inside(base, || call(options.flags, data)),
    }
    .map_err(refused)?;
    let finish = || -> Result<(), Errno> {
        // A bind mount takes its source's flags; only a second call can make it read-only.
        if options.flags.contains(MsFlags::MS_BIND) && options.needs_remount() {
            let flags = options.flags | MsFlags::MS_REMOUNT;
            nix::mount::mount(
                None::<&str>,
                &target.shown,
                None::<&str>,
                flags,
                None::<&str>,
            )?;
        }
        for &propagation in &options.propagation {
            nix::mount::mount(
                None::<&str>,
                &target.shown,
                None::<&str>,
                propagation,
                None::<&str>,
            )?;
        }
        Ok(())
    };
    if let Err(errno) = finish() {
        let _ = umount2(
            &target.shown,
            MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH,
        );
        return Err(refused(errno));
    }
    Ok(target.shown)
}

/// A mount point: the path to mount on, and the path to show and to unmount.
struct Target {
    /// Through a descriptor where symlinks had to be resolved inside the rootfs: nothing can be swapped after the check.
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

/// Unmounts everything at and below `target`, the latest first. What is not there is unmounted already.
pub fn unmount_recursive(target: &Path) -> Result<(), MountError> {
    let mut mounts: Vec<MountPoint> = read_mountinfo()
        .map_err(MountError::MountInfo)?
        .into_iter()
        .filter(|mount| mount.path.starts_with(target))
        .collect();
    // Later mounts lie over earlier ones: the reverse of the kernel's order takes the top one first.
    while let Some(mount) = mounts.pop() {
        unmount(&mount.path)?;
    }
    Ok(())
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
mod tests {
    use super::*;
    use std::fs;

    /// Unmounts whatever a failed test leaves.
    struct Mounted(PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = unmount_recursive(&self.0);
        }
    }

    fn below(dir: &Path) -> usize {
        read_mountinfo()
            .unwrap()
            .iter()
            .filter(|mount| mount.path.starts_with(dir))
            .count()
    }

    fn mount(kind: &str, source: &Path, options: &[&str]) -> Mount {
        Mount {
            kind: kind.into(),
            source: source.display().to_string(),
            target: String::new(),
            options: options.iter().map(|&o| o.into()).collect(),
        }
    }

    #[test]
    fn a_read_only_bind_is_read_only_and_leaves_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        let guard = Mounted(dir.path().to_owned());
        let (source, rootfs) = (dir.path().join("a b"), dir.path().join("rootfs"));
        fs::create_dir(&source).unwrap();
        fs::write(source.join("f"), "x").unwrap();
        mount_all(
            &[mount("bind", &source, &["rbind", "ro", "rprivate"])],
            &rootfs,
        )
        .unwrap();
        assert_eq!(fs::read_to_string(rootfs.join("f")).unwrap(), "x");
        assert_eq!(
            fs::write(rootfs.join("f"), "y").unwrap_err().kind(),
            io::ErrorKind::ReadOnlyFilesystem
        );
        unmount_recursive(&rootfs).unwrap();
        assert_eq!(below(dir.path()), 0);
        unmount_recursive(&rootfs).unwrap();
        drop(guard);
    }

    #[test]
    fn an_overlay_of_more_layers_than_fit_a_page_is_mounted() {
        let dir = tempfile::tempdir().unwrap();
        let _guard = Mounted(dir.path().to_owned());
        let tmp = dir.path().join("tmp");
        mount_all(&[mount("tmpfs", Path::new("tmpfs"), &["size=1m"])], &tmp).unwrap();
        let layers: Vec<PathBuf> = (0..120)
            .map(|number| tmp.join(format!("snapshots-with-long-names/{number}/fs")))
            .collect();
        for (number, layer) in layers.iter().enumerate() {
            fs::create_dir_all(layer).unwrap();
            fs::write(layer.join(format!("file{number}")), "x").unwrap();
        }
        let list = layers
            .iter()
            .map(|layer| layer.display().to_string())
            .collect::<Vec<_>>()
            .join(":");
        assert!(list.len() > 5000);
        let rootfs = dir.path().join("rootfs");
        mount_all(
            &[mount(
                "overlay",
                Path::new("overlay"),
                &[&format!("lowerdir={list}")],
            )],
            &rootfs,
        )
        .unwrap();
        assert_eq!(fs::read_dir(&rootfs).unwrap().count(), 120);
    }

    #[test]
    fn overlay_and_stacked_mounts_are_undone_latest_first() {
        let dir = tempfile::tempdir().unwrap();
        let _guard = Mounted(dir.path().to_owned());
        let tmp = dir.path().join("tmp");
        mount_all(&[mount("tmpfs", Path::new("tmpfs"), &["size=1m"])], &tmp).unwrap();
        for name in ["lower", "upper", "work"] {
            fs::create_dir(tmp.join(name)).unwrap();
        }
        fs::write(tmp.join("lower/f"), "low").unwrap();
        let options =
            ["lower", "upper", "work"].map(|n| format!("{n}dir={}", tmp.join(n).display()));
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let rootfs = tmp.join("rootfs");
        let over = mount("overlay", Path::new("overlay"), &options);
        mount_all(&[over, mount("tmpfs", Path::new("tmpfs"), &[])], &rootfs).unwrap();
        assert_eq!(below(&rootfs), 2);
        unmount_recursive(&tmp).unwrap();
        assert_eq!(below(dir.path()), 0);
    }

    #[test]
    fn what_a_failed_call_mounted_is_unmounted() {
        let dir = tempfile::tempdir().unwrap();
        let _guard = Mounted(dir.path().to_owned());
        let rootfs = dir.path().join("rootfs");
        let bad = mount("nonexistentfs", Path::new("x"), &[]);
        let error =
            mount_all(&[mount("tmpfs", Path::new("tmpfs"), &[]), bad], &rootfs).unwrap_err();
        assert!(error.to_string().contains("nonexistentfs"), "{error}");
        assert_eq!(below(dir.path()), 0);
    }

    #[test]
    fn a_symlink_in_a_target_cannot_leave_the_rootfs() {
        let dir = tempfile::tempdir().unwrap();
        let _guard = Mounted(dir.path().to_owned());
        let (rootfs, outside) = (dir.path().join("rootfs"), dir.path().join("outside"));
        fs::create_dir_all(rootfs.join("etc")).unwrap();
        fs::create_dir(&outside).unwrap();
        std::os::unix::fs::symlink(&outside, rootfs.join("evil")).unwrap();
        std::os::unix::fs::symlink("/etc", rootfs.join("inside")).unwrap();
        let mut tmpfs = mount("tmpfs", Path::new("tmpfs"), &[]);
        tmpfs.target = "evil".into();
        mount_all(&[tmpfs.clone()], &rootfs).unwrap_err();
        tmpfs.target = "../../outside".into();
        mount_all(&[tmpfs.clone()], &rootfs).unwrap_err();
        assert_eq!(below(dir.path()), 0);
        tmpfs.target = "inside".into();
        mount_all(&[tmpfs], &rootfs).unwrap();
        assert_eq!(below(&rootfs.join("etc")), 1);
    }
}

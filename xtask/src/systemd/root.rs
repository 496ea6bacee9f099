//! The guest's root file system: a minimal Debian with systemd, containerd and runc by mmdebstrap,
//! packed as the kernel unpacks it. Kept until what it is made of changes; has nothing of embedshim
//! in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use crate::matrix::initramfs;

const PACKAGES: &str = "containerd,dbus,procps,runc,systemd,systemd-sysv";
/// Half of the packages' files, which no check reads. Our own package's are installed later, and
/// whole.
const LEFT_OUT: [&str; 4] = [
    "/usr/share/doc/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/usr/share/zoneinfo/*",
];
/// What is done with the file system before it is packed: the exclusions end, no user logs in, the
/// clock is not asked for.
const FINISH: &str = "rm -f \"$1\"/etc/dpkg/dpkg.cfg.d/99mmdebstrap && \
                      rm -f \"$1\"/usr/bin/containerd-stress \"$1\"/usr/bin/containerd-shim-runc-v1 && \
                      ln -sf /dev/null \"$1\"/etc/systemd/system/getty.target && \
                      ln -sf /dev/null \"$1\"/etc/systemd/system/systemd-timesyncd.service && \
                      ln -sf /dev/null \"$1\"/etc/systemd/system/apt-daily.timer && \
                      ln -sf /checks/checks.service \"$1\"/etc/systemd/system/ && \
                      mkdir -p \"$1\"/etc/systemd/system/multi-user.target.wants && \
                      ln -sf /checks/checks.service \"$1\"/etc/systemd/system/multi-user.target.wants/";

/// The archive, made if it is not there or is another one.
pub(super) fn archive(suite: &str, directory: &Path) -> anyhow::Result<PathBuf> {
    let archive = directory.join("root.cpio");
    let recipe = format!("{suite}\n{PACKAGES}\n{LEFT_OUT:?}\n{FINISH}\n");
    let made_of = directory.join("root.recipe");
    if archive.exists() && fs::read_to_string(&made_of).is_ok_and(|before| before == recipe) {
        return Ok(archive);
    }
    println!("Making the root file system of a Debian {suite}");
    let _ = fs::remove_file(&made_of);
    let root = directory.join("root");
    let _ = fs::remove_dir_all(&root);
    let mut make = Command::new("mmdebstrap");
    make.args(["--quiet", "--variant=minbase", "--format=directory"])
        .arg(format!("--include={PACKAGES}"))
        .arg(format!("--customize-hook={FINISH}"));
    for pattern in LEFT_OUT {
        make.arg(format!("--dpkgopt=path-exclude={pattern}"));
    }
    let status = make
        .arg(suite)
        .arg(&root)
        .status()
        .context("cannot run mmdebstrap")?;
    ensure!(status.success(), "mmdebstrap: {status}");
    initramfs::pack(&root, &archive)?;
    fs::remove_dir_all(&root)?;
    fs::write(made_of, recipe)?;
    Ok(archive)
}

//! What the machine must have: packages of Debian and a mounted bpffs. Says what it is about to do
//! before it does it.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{FsType, statfs};

use crate::architecture::Architecture;

/// Where Debian puts the programs that make networks for pods.
pub const CNI_PLUGINS: &str = "/usr/lib/cni";
const BPFFS: &str = "/sys/fs/bpf";
const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);

/// One package, and how to see that it is not needed.
struct Requirement {
    package: &'static str,
    purpose: &'static str,
    is_there: fn() -> bool,
}

const REQUIREMENTS: [Requirement; 13] = [
    Requirement {
        package: "clang",
        purpose: "compiles the BPF program",
        is_there: || on_path("clang"),
    },
    Requirement {
        package: "libbpf-dev",
        purpose: "headers for the BPF program",
        is_there: || Path::new("/usr/include/bpf/bpf_helpers.h").exists(),
    },
    Requirement {
        package: "make",
        purpose: "compiles libbpf for the second loader",
        is_there: || on_path("make"),
    },
    Requirement {
        package: "pkg-config",
        purpose: "finds libelf for it",
        is_there: || on_path("pkg-config"),
    },
    Requirement {
        package: "libc6-dev",
        purpose: "links the static program in the test image",
        is_there: || !glob_is_empty("/usr/lib", "libc.a"),
    },
    Requirement {
        package: "protobuf-compiler",
        purpose: "compiles the CRI's messages for the tests",
        is_there: || on_path("protoc"),
    },
    Requirement {
        package: "containerd",
        purpose: "what all of this is for",
        is_there: || on_path("containerd"),
    },
    Requirement {
        package: "runc",
        purpose: "runs the containers",
        is_there: || on_path("runc"),
    },
    Requirement {
        package: "e2fsprogs",
        purpose: "makes the file system for loop mounts in tests",
        is_there: || on_path("mkfs.ext4"),
    },
    Requirement {
        package: "containernetworking-plugins",
        purpose: "networks for pods in tests",
        is_there: || Path::new(CNI_PLUGINS).join("ptp").exists(),
    },
    Requirement {
        package: "fuse-overlayfs",
        purpose: "a file system in user space to mount in tests",
        is_there: || on_path("fuse-overlayfs"),
    },
    Requirement {
        package: "fuse3",
        purpose: "its mount helper",
        is_there: || on_path("mount.fuse3"),
    },
    Requirement {
        package: "busybox-static",
        purpose: "the shell in the test image",
        is_there: || Path::new("/bin/busybox").exists(),
    },
];

/// What guests need beyond that.
const FOR_GUESTS: [Requirement; 3] = [
    Requirement {
        package: "qemu-system-x86",
        purpose: "boots other kernels",
        is_there: || on_path("qemu-system-x86_64"),
    },
    CPIO,
    CRUN,
];
const CPIO: Requirement = Requirement {
    package: "cpio",
    purpose: "packs what they boot into",
    is_there: || on_path("cpio"),
};
const CRUN: Requirement = Requirement {
    package: "crun",
    purpose: "the other OCI runtime, on pure cgroup v2",
    is_there: || on_path("crun"),
};

/// What guests of arm64 need beyond that. Elsewhere than on arm64, crun is fetched with what else
/// they run.
const FOR_ARM64_GUESTS: [Requirement; 2] = [
    Requirement {
        package: "qemu-system-arm",
        purpose: "boots kernels of arm64",
        is_there: || on_path("qemu-system-aarch64"),
    },
    CPIO,
];

/// What links for arm64 on another machine, beyond clang.
const FOR_ARM64_PROGRAMS: [Requirement; 1] = [Requirement {
    package: "binutils-aarch64-linux-gnu",
    purpose: "links, strips and reads programs of arm64",
    is_there: || on_path("aarch64-linux-gnu-ld"),
}];

/// What guests with a whole Debian need beyond that.
const FOR_DEBIAN_GUESTS: [Requirement; 1] = [Requirement {
    package: "mmdebstrap",
    purpose: "makes their root file system",
    is_there: || on_path("mmdebstrap"),
}];

/// What checks the package and its scripts.
const FOR_PACKAGE_CHECKS: [Requirement; 3] = [
    Requirement {
        package: "shellcheck",
        purpose: "checks the scripts that are shipped",
        is_there: || on_path("shellcheck"),
    },
    Requirement {
        package: "lintian",
        purpose: "checks the Debian package",
        is_there: || on_path("lintian"),
    },
    Requirement {
        package: "rpm",
        purpose: "makes and installs the RPM",
        is_there: || on_path("rpmbuild"),
    },
];

/// Installs what is missing and mounts bpffs.
pub fn prepare() -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("containers, BPF and mounts need root; run this as root");
    }
    install(&REQUIREMENTS)?;
    mount_bpffs()
}

/// The same, and what guests of an architecture need.
pub fn prepare_for_guests(architecture: Architecture) -> anyhow::Result<()> {
    prepare()?;
    match architecture {
        Architecture::X86_64 => install(&FOR_GUESTS),
        Architecture::Aarch64 => {
            install(&FOR_ARM64_GUESTS)?;
            match Architecture::native() {
                Some(Architecture::Aarch64) => install(&[CRUN]),
                _ => Ok(()),
            }
        }
    }
}

/// Installs what links programs of arm64.
pub(crate) fn prepare_for_arm64_programs() -> anyhow::Result<()> {
    install(&FOR_ARM64_PROGRAMS)
}

/// The same, and what guests with a whole Debian need.
pub fn prepare_for_debian_guests() -> anyhow::Result<()> {
    prepare_for_guests(Architecture::X86_64)?;
    install(&FOR_DEBIAN_GUESTS)
}

/// Installs what checks the package and its scripts.
pub fn prepare_for_package_checks() -> anyhow::Result<()> {
    install(&FOR_PACKAGE_CHECKS)
}

/// Two of us at once, as two suites in guests, would find apt's lists locked.
const APT_LOCK: &str = "/run/embedshim-testbed-apt.lock";

fn install(requirements: &[Requirement]) -> anyhow::Result<()> {
    let missing = || -> Vec<&Requirement> {
        let requirements = requirements.iter();
        requirements.filter(|it| !(it.is_there)()).collect()
    };
    if missing().is_empty() {
        return Ok(());
    }
    let lock = File::create(APT_LOCK).with_context(|| APT_LOCK.to_owned())?;
    lock.lock()?;
    // The other has perhaps installed them.
    let missing = missing();
    if missing.is_empty() {
        return Ok(());
    }
    println!("Installing by apt-get:");
    for requirement in &missing {
        println!("  {:15} {}", requirement.package, requirement.purpose);
    }
    if !on_path("apt-get") {
        bail!(
            "there is no apt-get here; install the packages above in this system's way and try again"
        );
    }
    apt(&["update", "--quiet"])?;
    let packages = missing.iter().map(|requirement| requirement.package);
    let patient = ["-o", "DPkg::Lock::Timeout=300"];
    let arguments: Vec<&str> = ["install", "--quiet", "--yes", "--no-install-recommends"]
        .into_iter()
        .chain(patient)
        .chain(packages)
        .collect();
    apt(&arguments)?;
    match missing.iter().find(|requirement| !(requirement.is_there)()) {
        Some(still) => bail!(
            "package {} is installed but what it is for is not there",
            still.package
        ),
        None => Ok(()),
    }
}

fn apt(arguments: &[&str]) -> anyhow::Result<()> {
    let mut apt = Command::new("apt-get");
    run(apt.args(arguments).env("DEBIAN_FRONTEND", "noninteractive"))
}

/// Runs a program that has nothing to say unless it fails.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?} failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

fn mount_bpffs() -> anyhow::Result<()> {
    let is_mounted = statfs(BPFFS).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC);
    if is_mounted {
        return Ok(());
    }
    println!("Mounting bpffs on {BPFFS}");
    mount(
        Some("bpf"),
        BPFFS,
        Some("bpf"),
        MsFlags::empty(),
        None::<&str>,
    )
    .with_context(|| format!("cannot mount bpffs on {BPFFS}"))
}

/// Whether a program is on `PATH`.
pub fn on_path(name: &str) -> bool {
    find_on_path(name).is_some()
}

/// Where a program is.
pub fn find_on_path(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
}

/// Whether no directory right below `base` has this file: multiarch puts libraries one level down.
fn glob_is_empty(base: &str, file: &str) -> bool {
    let Ok(entries) = std::fs::read_dir(base) else {
        return true;
    };
    !entries
        .flatten()
        .any(|entry| entry.path().join(file).exists())
}

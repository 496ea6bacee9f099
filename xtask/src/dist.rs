//! `cargo xtask dist`: what a release has: the Debian package, an archive with `install.sh` for
//! other systems, a bill of materials, and checksums. Owns the layout of the archive; what is
//! installed where is the script's (`packaging/install.sh`).

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use nix::sys::stat::{Mode, umask};
use testbed::machine;
use testbed::products::{self, Profile, strip, workspace};

use crate::deb::{self, Packing};
use crate::sbom;

/// The programs, which go to `bin`.
const PROGRAMS: [&str; 2] = ["embedshimd", "containerd-shim-embed-v1"];
/// Where each other file is here, and in the archive.
const FILES: [(&str, &str); 14] = [
    ("packaging/install.sh", "install.sh"),
    ("packaging/config.toml", "config.toml"),
    ("packaging/embedshimd.service", "systemd/embedshimd.service"),
    ("packaging/embedshimd.socket", "systemd/embedshimd.socket"),
    (
        "packaging/containerd-shim-embed-v1.8",
        "share/man/man8/containerd-shim-embed-v1.8",
    ),
    ("LICENSE", "share/doc/embedshim/LICENSE"),
    ("README.md", "share/doc/embedshim/README.md"),
    ("CHANGELOG.md", "share/doc/embedshim/CHANGELOG.md"),
    ("docs/operating.md", "share/doc/embedshim/operating.md"),
    ("docs/security.md", "share/doc/embedshim/security.md"),
    (
        "packaging/examples/containerd.toml",
        "share/doc/embedshim/examples/containerd.toml",
    ),
    (
        "packaging/examples/runtimeclass.yaml",
        "share/doc/embedshim/examples/runtimeclass.yaml",
    ),
    (
        "packaging/prometheus/embedshim.rules.yml",
        "share/doc/embedshim/examples/embedshim.rules.yml",
    ),
    (
        "packaging/grafana/embedshim.json",
        "share/doc/embedshim/examples/embedshim.json",
    ),
];

/// Builds what is shipped, and says where it is.
pub(crate) fn run() -> anyhow::Result<()> {
    machine::prepare()?;
    println!("Building embedshimd (release)");
    let programs = products::build(Profile::Release)?;
    let directory = workspace().join("target/dist");
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory)?;
    let version = deb::version()?;
    let name = format!("embedshim-{version}-linux-{}", std::env::consts::ARCH);
    make_tree(&programs, &directory.join(&name))?;
    let archive = format!("{name}.tar.gz");
    // The same bytes for the same files.
    let mut tar = Command::new("tar");
    tar.current_dir(&directory)
        .args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner"])
        .args(["--mtime=@0", "--use-compress-program=gzip -9n"])
        .args(["-cf", &archive, &name]);
    succeed(&mut tar)?;
    fs::remove_dir_all(directory.join(&name))?;
    deb::build(&programs, &version, Packing::Small, &directory)?;
    fs::remove_dir_all(directory.join("root"))?;
    let bill = directory.join(format!("embedshim-{version}.cdx.json"));
    fs::write(bill, sbom::bill()?)?;
    write_checksums(&directory)?;
    for file in fs::read_dir(&directory)? {
        println!("{}", file?.path().display());
    }
    Ok(())
}

/// Makes the directory that the archive has.
fn make_tree(programs: &Path, into: &Path) -> anyhow::Result<()> {
    // The files of the builder may be private; those of the archive are not.
    umask(Mode::from_bits_truncate(0o022));
    fs::create_dir_all(into.join("bin"))?;
    for program in PROGRAMS {
        strip(&programs.join(program), &into.join("bin").join(program))?;
    }
    for (file, target) in FILES {
        let target = into.join(target);
        fs::create_dir_all(target.parent().context("no directory")?)?;
        fs::copy(workspace().join(file), &target).with_context(|| file.to_owned())?;
        let is_script = target
            .extension()
            .is_some_and(|extension| extension == "sh");
        let mode = if is_script { 0o755 } else { 0o644 };
        fs::set_permissions(&target, fs::Permissions::from_mode(mode))?;
    }
    let mut documents = Command::new(programs.join("embedshimd"));
    succeed(documents.arg("documents").arg(into.join("share")))?;
    write_checksums(into)
}

/// Writes the checksums of all files in a directory and below it.
fn write_checksums(directory: &Path) -> anyhow::Result<()> {
    let script =
        "find * -type f ! -name SHA256SUMS -print0 | sort -z | xargs -0 sha256sum > SHA256SUMS";
    succeed(
        Command::new("sh")
            .args(["-c", script])
            .current_dir(directory),
    )
}

fn succeed(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status();
    let status = status.with_context(|| format!("cannot run {command:?}"))?;
    ensure!(status.success(), "{command:?} failed");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_of_the_archive_is_here() {
        for (file, _) in FILES {
            assert!(workspace().join(file).is_file(), "{file}");
        }
    }
}

//! `cargo xtask dist`: what a release has: the Debian package, an archive with `install.sh` for
//! other systems and `deploy.sh` for Kubernetes, a bill of materials, and checksums. Owns the
//! layout of the archive; what is installed where is the script's (`packaging/install.sh`).

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use nix::sys::stat::{Mode, umask};
use testbed::products::workspace;

use crate::deb::{self, Packing};
use crate::foreign;
use crate::programs::{self, Programs};
use crate::sbom;

/// Where each other file is here, and in the archive.
const FILES: [(&str, &str); 24] = [
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
        "packaging/examples/containerd-v3.toml",
        "share/doc/embedshim/examples/containerd-v3.toml",
    ),
    (
        "packaging/kubernetes/runtimeclass.yaml",
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
    ("packaging/kubernetes/deploy.sh", "kubernetes/deploy.sh"),
    (
        "packaging/kubernetes/Containerfile",
        "kubernetes/Containerfile",
    ),
    (
        "packaging/kubernetes/kustomization.yaml",
        "kubernetes/kustomization.yaml",
    ),
    (
        "packaging/kubernetes/namespace.yaml",
        "kubernetes/namespace.yaml",
    ),
    (
        "packaging/kubernetes/daemonset.yaml",
        "kubernetes/daemonset.yaml",
    ),
    (
        "packaging/kubernetes/runtimeclass.yaml",
        "kubernetes/runtimeclass.yaml",
    ),
    (
        "packaging/kubernetes/runtimeclass-pauseless.yaml",
        "kubernetes/runtimeclass-pauseless.yaml",
    ),
    (
        "packaging/kubernetes/remove/kustomization.yaml",
        "kubernetes/remove/kustomization.yaml",
    ),
    (
        "packaging/kubernetes/remove/daemonset.yaml",
        "kubernetes/remove/daemonset.yaml",
    ),
];

/// Builds what is shipped, and says where it is.
pub(crate) fn run(options: programs::Options) -> anyhow::Result<()> {
    let programs = Programs::build(options)?;
    let directory = workspace().join(directory(&programs));
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory)?;
    let version = deb::version()?;
    let name = format!("embedshim-{version}-linux-{}", programs.architecture());
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
    let package = deb::build(&programs, &version, Packing::Small, &directory)?;
    foreign::check(&package, &programs)?;
    fs::remove_dir_all(directory.join("root"))?;
    let bill = directory.join(format!("embedshim-{version}.cdx.json"));
    fs::write(bill, sbom::bill(programs.architecture())?)?;
    write_checksums(&directory)?;
    for file in fs::read_dir(&directory)? {
        println!("{}", file?.path().display());
    }
    Ok(())
}

/// What is made for another architecture does not take the place of what is made for this machine.
fn directory(programs: &Programs) -> String {
    match programs.toolchain() {
        None => "target/dist".to_owned(),
        Some(toolchain) => format!("target/dist-{}", toolchain.architecture().name()),
    }
}

/// Makes the directory that the archive has.
pub(crate) fn make_tree(programs: &Programs, into: &Path) -> anyhow::Result<()> {
    // The files of the builder may be private; those of the archive are not.
    umask(Mode::from_bits_truncate(0o022));
    fs::create_dir_all(into.join("bin"))?;
    for name in programs::NAMES {
        programs.strip(name, &into.join("bin").join(name))?;
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
    programs.write_documents(&into.join("share"))?;
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
    fn every_file_for_kubernetes_is_in_the_archive() {
        let mut directories = vec![workspace().join("packaging/kubernetes")];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    directories.push(path);
                    continue;
                }
                let path = path.strip_prefix(workspace()).unwrap();
                assert!(
                    FILES.iter().any(|(file, _)| Path::new(file) == path),
                    "{path:?}"
                );
            }
        }
    }

    #[test]
    fn every_file_of_the_archive_is_here() {
        for (file, _) in FILES {
            assert!(workspace().join(file).is_file(), "{file}");
        }
    }
}

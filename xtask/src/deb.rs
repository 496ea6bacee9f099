//! `cargo xtask deb`: the Debian package, by plain dpkg-deb. Owns what goes where and what the
//! binaries depend on; what the package's scripts do is theirs (`packaging/debian`).

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail, ensure};
use nix::sys::stat::{Mode, umask};
use testbed::products::workspace;

use crate::foreign;
use crate::programs::{self, Programs};

const NAME: &str = "embedshim";
const SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];
/// Where each file is here, and in the package. containerd finds the launcher in /usr/bin by its
/// `PATH`.
const FILES: [(&str, &str); 13] = [
    ("packaging/embedshimd.service", "lib/systemd/system"),
    ("packaging/embedshimd.socket", "lib/systemd/system"),
    ("packaging/config.toml", "etc/embedshim"),
    ("packaging/debian/copyright", "usr/share/doc/embedshim"),
    ("packaging/containerd-shim-embed-v1.8", "usr/share/man/man8"),
    ("docs/operating.md", "usr/share/doc/embedshim"),
    ("docs/sandbox.md", "usr/share/doc/embedshim"),
    (
        "packaging/examples/containerd.toml",
        "usr/share/doc/embedshim/examples",
    ),
    (
        "packaging/examples/containerd-v3.toml",
        "usr/share/doc/embedshim/examples",
    ),
    (
        "packaging/kubernetes/runtimeclass.yaml",
        "usr/share/doc/embedshim/examples",
    ),
    (
        "packaging/prometheus/embedshim.rules.yml",
        "usr/share/doc/embedshim/examples",
    ),
    (
        "packaging/grafana/embedshim.json",
        "usr/share/doc/embedshim/examples",
    ),
    ("packaging/debian/conffiles", "DEBIAN"),
];

/// What lintian is not to say, and why.
const OVERRIDES: &str = "packaging/debian/lintian-overrides";

/// How a package is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    /// For shipping.
    Small,
    /// For a guest that unpacks it once.
    Quick,
}

/// Builds what is shipped, and says where it is.
pub(crate) fn run(options: programs::Options) -> anyhow::Result<()> {
    let programs = Programs::build(options)?;
    let directory = workspace().join("target/deb");
    let package = build(&programs, &version()?, Packing::Small, &directory)?;
    foreign::check(&package, &programs)?;
    let mut show = Command::new("dpkg-deb");
    show.arg("--info").arg(&package);
    ensure!(show.status()?.success(), "{show:?} failed");
    println!("{}", package.display());
    Ok(())
}

/// The workspace's version, in Debian's order: 1.0.0-rc1 is before 1.0.0.
pub(crate) fn version() -> anyhow::Result<String> {
    let manifest = fs::read_to_string(workspace().join("Cargo.toml"))?;
    let version = manifest
        .lines()
        .find_map(|line| line.strip_prefix("version = \"")?.strip_suffix('"'))
        .context("Cargo.toml has no version")?;
    Ok(version.replace('-', "~"))
}

/// Packs these programs into a directory and returns the package's path.
pub(crate) fn build(
    built: &Programs,
    version: &str,
    packing: Packing,
    directory: &Path,
) -> anyhow::Result<PathBuf> {
    // The files of the builder may be private; those of the package are not.
    umask(Mode::from_bits_truncate(0o022));
    let root = directory.join("root");
    let _ = fs::remove_dir_all(&root);
    let mut programs = Vec::new();
    for name in programs::NAMES {
        let program = root.join("usr/bin").join(name);
        fs::create_dir_all(root.join("usr/bin"))?;
        built.strip(name, &program)?;
        programs.push(program);
    }
    for (file, target) in FILES {
        install(file, &root.join(target), 0o644)?;
    }
    // A file for each package, which has its name.
    let overrides = root.join("usr/share/lintian/overrides").join(NAME);
    install_as(OVERRIDES, &overrides, 0o644)?;
    write_documents(built, &root.join("usr/share"))?;
    for script in SCRIPTS {
        let file = format!("packaging/debian/{script}");
        install(&file, &root.join("DEBIAN"), 0o755)?;
    }
    write_changelog(&root, version)?;
    let architecture = built.debian_architecture()?;
    let control = fs::read_to_string(workspace().join("packaging/debian/control"))?
        .replace("@VERSION@", version)
        .replace("@ARCHITECTURE@", &architecture)
        .replace("@SIZE@", &size(&root)?)
        .replace(
            "@DEPENDS@",
            &dependencies(&built.tool("objdump"), &programs)?,
        );
    fs::write(root.join("DEBIAN/control"), control)?;
    // Checksums, for `dpkg --verify`.
    let script = "cd \"$1\" && find * -path DEBIAN -prune -o -type f -print0 | sort -z | xargs -0 md5sum > DEBIAN/md5sums";
    output(Command::new("sh").args(["-c", script, "sh"]).arg(&root))?;
    let package = directory.join(format!("{NAME}_{version}_{architecture}.deb"));
    let compression = match packing {
        Packing::Small => "-Zxz",
        Packing::Quick => "-Znone",
    };
    let mut pack = Command::new("dpkg-deb");
    pack.args(["--root-owner-group", compression, "--build"])
        .args([&root, &package]);
    if let Ok(time) = commit_time("%ct") {
        pack.env("SOURCE_DATE_EPOCH", time);
    }
    output(&mut pack)?;
    Ok(package)
}

/// Copies a file of the workspace into a directory.
fn install(file: &str, directory: &Path, mode: u32) -> anyhow::Result<()> {
    let name = Path::new(file).file_name().context("no file name")?;
    install_as(file, &directory.join(name), mode)
}

/// Copies a file of the workspace to a path. The mode does not depend on who has checked it out.
fn install_as(file: &str, target: &Path, mode: u32) -> anyhow::Result<()> {
    let source = workspace().join(file);
    fs::create_dir_all(target.parent().context("no directory")?)?;
    fs::copy(&source, target).with_context(|| source.display().to_string())?;
    Ok(fs::set_permissions(
        target,
        fs::Permissions::from_mode(mode),
    )?)
}

/// Writes man pages, compressed as Debian wants them, and shell completions below a directory.
fn write_documents(built: &Programs, share: &Path) -> anyhow::Result<()> {
    built.write_documents(share)?;
    for page in fs::read_dir(share.join("man/man8"))? {
        output(Command::new("gzip").arg("-9n").arg(page?.path()))?;
    }
    Ok(())
}

/// What dpkg and apt know of a package's past.
fn write_changelog(root: &Path, version: &str) -> anyhow::Result<()> {
    let time = commit_time("%cD").or_else(|_| output(Command::new("date").arg("-R")))?;
    let text = format!(
        "{NAME} ({version}) unstable; urgency=medium\n\n  * What has changed is in the log of the repository.\n\n \
         -- The embedshim developers <embedshim@embedshim.invalid>  {time}\n"
    );
    let file = root.join("usr/share/doc/embedshim/changelog");
    fs::write(&file, text)?;
    output(Command::new("gzip").args(["-9n"]).arg(&file)).map(|_| ())
}

/// When the commit was made that this is built from.
fn commit_time(format: &str) -> anyhow::Result<String> {
    let mut git = Command::new("git");
    git.current_dir(workspace())
        .args(["log", "-1", &format!("--format={format}")]);
    output(git.stderr(Stdio::null()))
}

/// In kB, as dpkg counts.
fn size(root: &Path) -> anyhow::Result<String> {
    let mut du = Command::new("du");
    let text = output(du.args(["-sk", "--exclude=DEBIAN"]).arg(root))?;
    let size = text.split_whitespace().next().context("du says nothing")?;
    Ok(size.to_owned())
}

/// The packages of the libraries that the programs are linked to, and how new the C library must
/// be.
fn dependencies(objdump: &str, programs: &[PathBuf]) -> anyhow::Result<String> {
    let mut packages = BTreeSet::new();
    let mut newest = (0, 0);
    for program in programs {
        let text = output(Command::new(objdump).arg("-p").arg(program))?;
        for library in needed(&text) {
            packages.insert(package_of(library)?);
        }
        newest = newest.max(newest_symbol(&text));
    }
    packages.remove("libc6");
    let (major, minor) = newest;
    let others = packages.iter().map(|package| format!(", {package}"));
    Ok(format!("libc6 (>= {major}.{minor})") + &others.collect::<String>())
}

fn needed(headers: &str) -> impl Iterator<Item = &str> {
    headers
        .lines()
        .filter_map(|line| line.trim().strip_prefix("NEEDED").map(str::trim))
}

fn package_of(library: &str) -> anyhow::Result<&'static str> {
    match library {
        "libgcc_s.so.1" => Ok("libgcc-s1"),
        "libelf.so.1" => Ok("libelf1"),
        "libz.so.1" => Ok("zlib1g"),
        _ if library.starts_with("libc.so.") || library.starts_with("libm.so.") => Ok("libc6"),
        _ if library.starts_with("ld-linux") => Ok("libc6"),
        _ => bail!("no package is known for the library {library}; add it to xtask/src/deb.rs"),
    }
}

/// The newest `GLIBC_2.34` of the versions that a program refers to.
fn newest_symbol(headers: &str) -> (u32, u32) {
    let versions = headers.split_whitespace().filter_map(|word| {
        let mut numbers = word.strip_prefix("GLIBC_")?.split('.');
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    });
    versions.max().unwrap_or_default()
}

pub(crate) fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_installed_manual_links_to_nothing_that_is_not_installed() {
        let manual = fs::read_to_string(workspace().join("docs/operating.md")).unwrap();
        let links = manual.split("](").skip(1);
        let links = links.filter_map(|rest| rest.split([')', '#']).next());
        for link in links.filter(|link| !link.is_empty() && !link.contains("://")) {
            let is_installed = FILES
                .iter()
                .any(|(file, target)| *file == format!("docs/{link}") && target.ends_with(NAME));
            assert!(is_installed, "{link}");
        }
    }

    #[test]
    fn what_a_program_is_linked_to_is_read_off_its_headers() {
        let headers = "Dynamic Section:\n  NEEDED               libgcc_s.so.1\n  NEEDED               libc.so.6\n\
                       Version References:\n  required from libc.so.6:\n    0x06969194 0x00 07 GLIBC_2.14\n    \
                       0x069691b4 0x00 02 GLIBC_2.34\n    0x09691a75 0x00 03 GLIBC_2.2.5\n";
        assert_eq!(
            needed(headers).collect::<Vec<_>>(),
            ["libgcc_s.so.1", "libc.so.6"]
        );
        assert_eq!(newest_symbol(headers), (2, 34));
    }
}

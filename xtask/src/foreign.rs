//! What can be known of a package for another architecture without that machine: it has the files
//! and dependencies of this machine's, its programs are of its architecture, and they need no newer
//! C library. Checked whenever one is built.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail, ensure};
use testbed::architecture::Architecture;

use crate::deb::{self, Packing, output};
use crate::programs::{self, Programs};

/// The C library of Debian 12, which is the oldest that has all we need.
const NEWEST_C_LIBRARY: (u32, u32) = (2, 36);

/// Checks a Debian package; one for this machine needs no check of this kind.
pub(crate) fn check(package: &Path, programs: &Programs) -> anyhow::Result<()> {
    let Some(toolchain) = programs.toolchain() else {
        return Ok(());
    };
    let scratch = tempfile::tempdir()?;
    let version = deb::version()?;
    let own = deb::build(&programs.own(), &version, Packing::Quick, scratch.path())?;
    let field = |package: &Path, name: &str| {
        let mut show = Command::new("dpkg-deb");
        output(show.arg("--field").arg(package).arg(name))
    };
    let architecture = toolchain.architecture();
    let named = field(package, "Architecture")?;
    ensure!(
        named == architecture.debian(),
        "it is a package for {named}"
    );
    let [ours, its] = [&own, package].map(contents);
    compare(&ours?, &its?)?;
    let [ours, its] = [&own, package].map(|package| field(package, "Depends"));
    compare_dependencies(&ours?, &its?)?;
    for name in programs::NAMES {
        let mut headers = Command::new(programs.tool("readelf"));
        headers.args(["-h", "-l"]);
        let headers = output(headers.arg(programs.directory().join(name)))?;
        check_headers(&headers, architecture).with_context(|| name.to_owned())?;
    }
    Ok(())
}

/// The files of a package, with modes and owners, in order.
fn contents(package: &Path) -> anyhow::Result<Vec<String>> {
    let listed = output(Command::new("dpkg-deb").arg("--contents").arg(package))?;
    let mut files: Vec<String> = listed.lines().filter_map(without_size).collect();
    files.sort();
    ensure!(!files.is_empty(), "{} is empty", package.display());
    Ok(files)
}

/// `-rwxr-xr-x root/root 123 2026-11-30 05:00 ./usr/bin/embedshimd` without size and time.
fn without_size(line: &str) -> Option<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        [mode, owner, _, _, _, path @ ..] => Some(format!("{mode} {owner} {}", path.join(" "))),
        _ => None,
    }
}

fn compare(ours: &[String], its: &[String]) -> anyhow::Result<()> {
    let missing = ours.iter().find(|file| !its.contains(file));
    let strange = its.iter().find(|file| !ours.contains(file));
    match (missing, strange) {
        (None, None) => Ok(()),
        (Some(file), _) => bail!("this machine's package has {file}, the other one does not"),
        (None, Some(file)) => bail!("the package has {file}, this machine's does not"),
    }
}

/// `libc6 (>= 2.34), libgcc-s1`: the same packages, and a C library that Debian 12 has.
fn compare_dependencies(ours: &str, its: &str) -> anyhow::Result<()> {
    let names = |list: &str| -> Vec<String> {
        let packages = list.split(", ");
        let names = packages.filter_map(|package| package.split_whitespace().next());
        names.map(str::to_owned).collect()
    };
    ensure!(
        names(ours) == names(its),
        "it depends on {its}, this machine's package on {ours}"
    );
    let version = its.split_once("libc6 (>= ").map(|(_, rest)| rest);
    let version = version.and_then(|rest| rest.split(')').next()?.split_once('.'));
    let (major, minor) = version.with_context(|| format!("no version of libc6: {its}"))?;
    ensure!(
        (major.parse()?, minor.parse()?) <= NEWEST_C_LIBRARY,
        "it needs a newer C library than Debian 12's: {its}"
    );
    Ok(())
}

/// What `readelf -h -l` says of a program.
fn check_headers(headers: &str, architecture: Architecture) -> anyhow::Result<()> {
    let (machine, loader) = match architecture {
        Architecture::X86_64 => (
            "Advanced Micro Devices X86-64",
            "/lib64/ld-linux-x86-64.so.2",
        ),
        Architecture::Aarch64 => ("AArch64", "/lib/ld-linux-aarch64.so.1"),
    };
    ensure!(headers.contains(machine), "it does not name {machine}");
    // The launcher is linked statically.
    let has_loader = headers.contains("program interpreter");
    ensure!(
        !has_loader || headers.contains(loader),
        "it does not name {loader}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_for_another_architecture_has_the_same_files() {
        let file = |line| without_size(line).unwrap();
        let ours = [
            file("-rwxr-xr-x root/root 7000 2026-11-30 05:00 ./usr/bin/embedshimd"),
            file("-rw-r--r-- root/root 90 2026-11-30 05:00 ./etc/embedshim/config.toml"),
        ];
        let mut its = [
            file("-rwxr-xr-x root/root 6500 2026-11-30 06:00 ./usr/bin/embedshimd"),
            file("-rw-r--r-- root/root 90 2026-11-30 05:00 ./etc/embedshim/config.toml"),
        ];
        compare(&ours, &its).unwrap();
        assert!(compare(&ours, its.get(..1).unwrap()).is_err());
        assert!(compare(ours.get(..1).unwrap(), &its).is_err());
        its[1] = file("-rw------- root/root 90 2026-11-30 05:00 ./etc/embedshim/config.toml");
        assert!(compare(&ours, &its).is_err());
    }

    #[test]
    fn it_depends_on_the_same_packages_and_on_no_newer_c_library() {
        let ours = "libc6 (>= 2.34), libgcc-s1";
        compare_dependencies(ours, "libc6 (>= 2.34), libgcc-s1").unwrap();
        compare_dependencies("libc6 (>= 2.39), libgcc-s1", ours).unwrap();
        for its in ["libc6 (>= 2.39), libgcc-s1", "libc6 (>= 2.34)", "libgcc-s1"] {
            assert!(compare_dependencies(ours, its).is_err(), "{its}");
        }
    }

    #[test]
    fn the_programs_are_of_the_architecture() {
        let headers = "  Machine:                           AArch64\n\
                       [Requesting program interpreter: /lib/ld-linux-aarch64.so.1]\n";
        check_headers(headers, Architecture::Aarch64).unwrap();
        assert!(check_headers(headers, Architecture::X86_64).is_err());
        let other = headers.replace("ld-linux-aarch64.so.1", "ld.so");
        assert!(check_headers(&other, Architecture::Aarch64).is_err());
        let statically = headers.lines().next().unwrap();
        check_headers(statically, Architecture::Aarch64).unwrap();
    }
}

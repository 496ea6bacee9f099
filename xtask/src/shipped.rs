//! What is shipped, as Debian's own checkers see it: shellcheck the scripts, lintian the package.
//! Owns which files are scripts; what a checker is not to say of the package, and why, is in
//! `packaging/debian/lintian-overrides`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use testbed::machine;
use testbed::products::workspace;

use crate::deb::{self, Packing};
use crate::programs::Programs;

/// How a script begins.
const SHEBANG: &[u8] = b"#!";
/// What is so because the package is packed for one look.
const OF_PACKING: &str =
    "uses-no-compression-for-data-tarball,uses-no-compression-for-control-tarball";

/// Checks the scripts below `packaging`, and a package with these programs.
pub(crate) fn check(binaries: &Path) -> anyhow::Result<()> {
    machine::prepare_for_package_checks()?;
    check_scripts()?;
    let directory = workspace().join("target/lintian");
    let programs = Programs::of_this_machine(binaries);
    let package = deb::build(&programs, &deb::version()?, Packing::Quick, &directory)?;
    let mut lintian = Command::new("lintian");
    lintian
        .args(["--allow-root", "--no-cfg", "--fail-on", "error,warning"])
        .args(["--tag-display-limit", "0", "--suppress-tags", OF_PACKING])
        .arg(&package);
    succeed(&mut lintian)?;
    Ok(fs::remove_file(package)?)
}

fn check_scripts() -> anyhow::Result<()> {
    let scripts = scripts(&workspace().join("packaging"))?;
    ensure!(!scripts.is_empty(), "there are no scripts in packaging");
    succeed(Command::new("shellcheck").args(scripts))
}

/// All scripts in a directory and below it.
fn scripts(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut scripts = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            scripts.extend(self::scripts(&path)?);
        } else if fs::read(&path)?.starts_with(SHEBANG) {
            scripts.push(path);
        }
    }
    Ok(scripts)
}

/// Runs a checker, whose complaints are the error.
fn succeed(checker: &mut Command) -> anyhow::Result<()> {
    let output = checker
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {checker:?}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    let name = checker.get_program().to_string_lossy();
    ensure!(output.status.success(), "{name}:\n{said}{complained}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_script_that_is_shipped_is_checked() {
        let scripts = scripts(&workspace().join("packaging")).unwrap();
        for name in [
            "install.sh",
            "kubernetes/deploy.sh",
            "debian/postinst",
            "debian/prerm",
            "debian/postrm",
        ] {
            let path = workspace().join("packaging").join(name);
            assert!(scripts.contains(&path), "{name}");
        }
    }
}

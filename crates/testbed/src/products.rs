//! Building what we ship.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

/// With this feature a daemon dies where a test wants it to.
pub const FAILPOINTS: &str = "embedshimd/failpoints";

/// The workspace's root.
pub fn workspace() -> PathBuf {
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    own.ancestors()
        .nth(2)
        .map_or_else(|| own.clone(), PathBuf::from)
}

/// Cargo as it was called, or the one on `PATH`.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace());
    cargo
}

/// How to build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Quick to build, with assertions: for tests.
    Dev,
    /// What is shipped.
    Release,
}

/// Builds `embedshimd` and the launcher and returns the directory they are in.
pub fn build(profile: Profile) -> anyhow::Result<PathBuf> {
    let features = match profile {
        Profile::Dev => &["--features", FAILPOINTS][..],
        Profile::Release => &[],
    };
    build_targets("embedshimd", "--bins", features, profile)
}

/// Builds the examples of the library and returns the directory they are in.
pub fn build_examples() -> anyhow::Result<PathBuf> {
    let directory = build_targets("embedshim-core", "--examples", &[], Profile::Dev)?;
    Ok(directory.join("examples"))
}

/// Builds the programs of the tests and returns the path of one.
pub fn build_test_program(name: &str) -> anyhow::Result<PathBuf> {
    let directory = build_targets("embedshim-tests", "--bins", &[], Profile::Dev)?;
    Ok(directory.join(name))
}

fn build_targets(
    package: &str,
    targets: &str,
    features: &[&str],
    profile: Profile,
) -> anyhow::Result<PathBuf> {
    let (flag, name) = match profile {
        Profile::Dev => ("dev", "debug"),
        Profile::Release => ("release", "release"),
    };
    let status = cargo()
        .args(["build", "--quiet", "--package", package, targets])
        .args(["--profile", flag])
        .args(features)
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("{package} does not build");
    }
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace().join("target"), PathBuf::from);
    Ok(workspace().join(target).join(name))
}

/// Copies a program without its symbols.
pub fn strip(program: &Path, target: &Path) -> anyhow::Result<()> {
    let status = Command::new("strip")
        .arg("-o")
        .arg(target)
        .arg(program)
        .status();
    ensure!(
        status.context("binutils are needed")?.success(),
        "strip {}",
        program.display()
    );
    Ok(())
}

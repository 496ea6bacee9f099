//! Building what we ship.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

/// With the first of these a daemon dies where a test wants it to, with the second it sends spans.
const FEATURES: &str = "embedshimd/failpoints,embedshimd/otel";

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

impl Profile {
    /// What it is called in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dev => "dev",
            Self::Release => "release",
        }
    }
}

/// Builds `embedshimd` and the launcher and returns the directory they are in.
pub fn build(profile: Profile) -> anyhow::Result<PathBuf> {
    match profile {
        Profile::Dev => build_dev(),
        Profile::Release => {
            build_shipped(|subcommand| {
                let mut cargo = cargo();
                cargo.arg(subcommand);
                cargo
            })?;
            Ok(directory("release"))
        }
    }
}

/// Builds the examples of the library and returns the directory they are in.
pub fn build_examples() -> anyhow::Result<PathBuf> {
    Ok(build_dev()?.join("examples"))
}

/// Builds the programs of the tests and returns the path of one.
pub fn build_test_program(name: &str) -> anyhow::Result<PathBuf> {
    Ok(build_dev()?.join(name))
}

/// Selects what tests need in the `dev` profile, for any subcommand of cargo. Cargo compiles a
/// dependency again for each set of features that the selected packages and their tests want of it;
/// the whole workspace with examples, which count as tests, is always the same set. What is shipped
/// is built with its own.
pub const DEV_SELECTION: [&str; 3] = ["--workspace", "--features", FEATURES];

/// The program that containerd executes.
const LAUNCHER: &str = "containerd-shim-embed-v1";

/// The programs that tests start, but for xtask.
const DEV_PROGRAMS: [&str; 6] = [
    "embedshimd",
    LAUNCHER,
    "chaos",
    "crowd",
    "embedshim-bench",
    "pod-costs",
];

fn build_dev() -> anyhow::Result<PathBuf> {
    let mut selection = DEV_SELECTION.to_vec();
    selection.push("--examples");
    selection.extend(DEV_PROGRAMS.iter().flat_map(|name| ["--bin", name]));
    run_cargo(&selection, "dev")?;
    Ok(directory("debug"))
}

/// Builds what is shipped, by commands of cargo's. The launcher is linked statically: containerd
/// executes it three times in a container's life, and a quarter of each was the loading of
/// libraries.
pub(crate) fn build_shipped(cargo: impl Fn(&str) -> Command) -> anyhow::Result<()> {
    let selected = |subcommand: &str, program: &str| {
        let mut command = cargo(subcommand);
        command
            .args(["--quiet", "--release", "--package", "embedshimd"])
            .args(["--bin", program]);
        command
    };
    let mut launcher = selected("rustc", LAUNCHER);
    launcher.args(["--", "-C", "target-feature=+crt-static"]);
    for mut command in [selected("build", "embedshimd"), launcher] {
        let status = command.status().context("cannot run cargo")?;
        ensure!(status.success(), "the products do not build");
    }
    Ok(())
}

fn run_cargo(selection: &[&str], profile: &str) -> anyhow::Result<()> {
    let status = cargo()
        .args(["build", "--quiet", "--profile", profile])
        .args(selection)
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("the products do not build");
    }
    Ok(())
}

/// Where the programs of a profile are.
fn directory(profile: &str) -> PathBuf {
    target_directory().join(profile)
}

/// Where cargo puts what it makes.
pub(crate) fn target_directory() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace().join("target"), PathBuf::from);
    workspace().join(target)
}

/// Copies a program without its symbols.
pub fn strip(program: &Path, target: &Path) -> anyhow::Result<()> {
    strip_by("strip", program, target)
}

/// The same by another architecture's `strip`.
pub fn strip_by(tool: &str, program: &Path, target: &Path) -> anyhow::Result<()> {
    let status = Command::new(tool)
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

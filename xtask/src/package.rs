//! `cargo xtask package`: the library crates as packages, as a registry would get them. Owns which
//! crates those are; never publishes one.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::Value;
use testbed::products::{cargo, workspace};

/// Options of `cargo xtask package`
#[derive(Args, Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    /// Also compile each package from what is in it, and its examples, with the other packages
    /// instead of the workspace: minutes
    #[arg(long)]
    verify: bool,
}

/// Packages all of them together: each needs the others, which no registry has.
pub(crate) fn run(options: Options) -> anyhow::Result<()> {
    let mut packaging = command(&libraries()?);
    if !options.verify {
        packaging.arg("--no-verify");
    }
    let status = packaging.status().context("cannot run cargo package")?;
    ensure!(status.success(), "the libraries cannot be packaged");
    if options.verify {
        check_examples(&libraries()?)?;
    }
    Ok(())
}

/// Compiles the examples in the packages, where the verification has unpacked them: no file of the
/// workspace is there.
fn check_examples(libraries: &[String]) -> anyhow::Result<()> {
    let packages = workspace().join("target/package");
    for library in libraries {
        let package = unpacked(&packages, library)?;
        if !package.join("examples").is_dir() {
            continue;
        }
        let mut check = cargo();
        check.args(["check", "--quiet", "--offline", "--examples"]);
        check.arg("--manifest-path").arg(package.join("Cargo.toml"));
        check.arg("--target-dir").arg(packages.join("examples"));
        for other in libraries.iter().filter(|other| *other != library) {
            let directory = unpacked(&packages, other)?;
            let replacement = format!(
                "patch.crates-io.{other}.path={:?}",
                directory.display().to_string()
            );
            check.args(["--config", &replacement]);
        }
        let status = check.status().context("cannot run cargo check")?;
        ensure!(
            status.success(),
            "{library}: the examples in its package do not compile"
        );
    }
    Ok(())
}

fn unpacked(packages: &Path, library: &str) -> anyhow::Result<PathBuf> {
    let metadata = metadata()?;
    let package = list(&metadata)?
        .iter()
        .find(|package| name_of(package) == Some(library));
    let version = package.and_then(|package| package.get("version")?.as_str());
    let version = version.with_context(|| format!("{library} has no version"))?;
    Ok(packages.join(format!("{library}-{version}")))
}

fn command(libraries: &[String]) -> Command {
    let mut cargo = cargo();
    // What is not committed is packaged as well, so that it can be tried before it is committed.
    cargo.args(["package", "--quiet", "--allow-dirty", "--offline"]);
    for library in libraries {
        cargo.args(["--package", library]);
    }
    cargo
}

/// The crates of the workspace that may be published.
fn libraries() -> anyhow::Result<Vec<String>> {
    let metadata = metadata()?;
    let published = list(&metadata)?
        .iter()
        .filter(|package| is_published(package));
    Ok(published.filter_map(name_of).map(str::to_owned).collect())
}

fn metadata() -> anyhow::Result<Value> {
    let output = cargo()
        .args(["metadata", "--format-version=1", "--no-deps"])
        .output()
        .context("cannot run cargo metadata")?;
    serde_json::from_slice(&output.stdout).context("cargo metadata")
}

fn list(metadata: &Value) -> anyhow::Result<&Vec<Value>> {
    let packages = metadata.get("packages").and_then(Value::as_array);
    packages.context("cargo metadata without packages")
}

fn name_of(package: &Value) -> Option<&str> {
    package.get("name")?.as_str()
}

/// `publish = false` is an empty list of registries.
pub(crate) fn is_published(package: &Value) -> bool {
    package.get("publish").is_some_and(Value::is_null)
}

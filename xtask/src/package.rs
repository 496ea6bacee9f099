//! `cargo xtask package`: the library crates as packages, as a registry would get them. Owns which
//! crates those are; never publishes one.

use std::process::Command;

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::Value;
use testbed::products::cargo;

/// Options of `cargo xtask package`
#[derive(Args, Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    /// Also compile each package from what is in it, with the other packages instead of the
    /// workspace: minutes
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
    Ok(())
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
    let output = cargo()
        .args(["metadata", "--format-version=1", "--no-deps"])
        .output()
        .context("cannot run cargo metadata")?;
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    let packages = metadata.get("packages").and_then(Value::as_array);
    let packages = packages.context("cargo metadata without packages")?;
    let published = packages.iter().filter(|package| is_published(package));
    let names = published.filter_map(|package| package.get("name")?.as_str());
    Ok(names.map(str::to_owned).collect())
}

/// `publish = false` is an empty list of registries.
pub(crate) fn is_published(package: &Value) -> bool {
    package.get("publish").is_some_and(Value::is_null)
}

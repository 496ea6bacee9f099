//! `cargo xtask test`: builds the products, runs every test of the workspace, and counts. What is skipped says why, and in CI
//! (environment variable `CI`) counts as failed.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use anyhow::{Context, bail};
use clap::Args;
use xtask::machine;
use xtask::products::{self, Profile};

/// Options of `cargo xtask test`.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Run the end-to-end suite against this runtime only, such as io.containerd.runc.v2
    #[arg(long, value_name = "NAME")]
    runtime: Option<String>,
    /// Run only tests whose name contains this
    filter: Option<String>,
}

#[derive(Debug, Default)]
struct Counts {
    passed: u32,
    failed: u32,
    skipped: u32,
}

/// Runs the tests.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    machine::prepare()?;
    let binaries = products::build(Profile::Dev)?;
    let mut cargo = products::cargo();
    cargo.args(["test", "--no-fail-fast"]);
    match &options.runtime {
        None => cargo.args(["--workspace", "--all-targets"]),
        Some(runtime) => {
            cargo.env("EMBEDSHIM_TEST_RUNTIME", runtime);
            cargo.args(["--package", "embedshim-tests", "--test", "end_to_end"])
        }
    };
    cargo.arg("--").args(&options.filter);
    cargo
        .env("EMBEDSHIM_TEST_BINARIES", binaries)
        .stdout(Stdio::piped());
    let mut child = cargo.spawn().context("cannot run cargo test")?;
    let stdout = child.stdout.take().context("no output of cargo test")?;
    let mut counts = Counts::default();
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        println!("{line}");
        counts.add(&line);
    }
    let status = child.wait()?;
    println!(
        "\n{} passed, {} failed, {} skipped",
        counts.passed, counts.failed, counts.skipped
    );
    if !status.success() || counts.failed > 0 {
        bail!("tests failed");
    }
    if counts.passed == 0 {
        bail!("no test was run");
    }
    if counts.skipped > 0 && std::env::var_os("CI").is_some() {
        bail!("tests were skipped, which CI does not accept");
    }
    Ok(())
}

impl Counts {
    /// Adds a line such as `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out`.
    fn add(&mut self, line: &str) {
        let Some((_, numbers)) = line
            .strip_prefix("test result: ")
            .and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        for part in numbers.split(';') {
            let mut words = part.split_whitespace();
            let number = words
                .next()
                .and_then(|number| number.parse().ok())
                .unwrap_or(0);
            match words.next() {
                Some("passed") => self.passed += number,
                Some("failed") => self.failed += number,
                Some("ignored") => self.skipped += number,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted() {
        let mut counts = Counts::default();
        counts.add("running 4 tests");
        counts.add("test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.1s");
        counts.add("test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s");
        assert_eq!((counts.passed, counts.failed, counts.skipped), (4, 2, 1));
    }
}

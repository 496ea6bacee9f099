//! `cargo xtask api`: what the library crates make public, as Rust without bodies. Owns the
//! snapshots, `crates/*/public-api.txt`; a change to them is a change of the API, to be seen as
//! such in a commit. `cargo xtask tidy` compares.
//!
//! Read from the sources, since the compiler's own list (rustdoc's JSON) needs an unstable option
//! and a build of all dependencies. So names in signatures are those of the source file, and what a
//! macro or a derive generates is not listed.

mod crate_source;
mod strip;
mod surface;

use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use testbed::products::workspace;

/// The crates with an API to keep.
const LIBRARIES: [&str; 7] = [
    "embedshim-core",
    "exit-conformance",
    "exit-monitor",
    "monitor-bpf",
    "monitor-pidfd",
    "monitor-ptrace",
    "shim-api",
];
const SNAPSHOT: &str = "public-api.txt";
/// How to change a snapshot.
const ACCEPT: &str = "if the API is meant to change, run `cargo xtask api --accept` and commit it";

/// Options of `cargo xtask api`
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Write the snapshots that `cargo xtask tidy` compares with, instead of printing
    #[arg(long)]
    accept: bool,
    /// Only these crates; all libraries if none is named
    #[arg(value_name = "CRATE", value_parser = LIBRARIES)]
    crates: Vec<String>,
}

/// Prints the API, or accepts it.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let is_chosen = |library: &&str| {
        options.crates.is_empty() || options.crates.iter().any(|chosen| chosen == library)
    };
    for library in LIBRARIES.into_iter().filter(is_chosen) {
        let api = api_of(library)?;
        if options.accept {
            let file = snapshot(library);
            fs::write(&file, api).with_context(|| file.display().to_string())?;
        } else {
            print!("{api}");
        }
    }
    Ok(())
}

/// Lists the crates whose API is not the one in their snapshot.
pub(crate) fn check(violations: &mut Vec<String>) -> anyhow::Result<()> {
    for library in LIBRARIES {
        let accepted = fs::read_to_string(snapshot(library)).unwrap_or_default();
        let api = api_of(library)?;
        if api != accepted {
            violations.push(format!(
                "{library}: the public API is not the one in {SNAPSHOT}; {ACCEPT}"
            ));
            violations.extend(difference(&accepted, &api));
        }
    }
    Ok(())
}

fn api_of(library: &str) -> anyhow::Result<String> {
    let root = workspace().join("crates").join(library).join("src/lib.rs");
    let source = crate_source::read(&root)?;
    Ok(format!(
        "// The public API of {library}, by `cargo xtask api --accept`. `_private: _` stands for private fields.\n\n{}",
        surface::print(&source)
    ))
}

fn snapshot(library: &str) -> PathBuf {
    workspace().join("crates").join(library).join(SNAPSHOT)
}

/// The lines that one has and the other has not, from the first to the last that differ.
fn difference(old: &str, new: &str) -> Vec<String> {
    let (old, new): (Vec<_>, Vec<_>) = (old.lines().collect(), new.lines().collect());
    let equal = |pairs: &mut dyn Iterator<Item = (&&str, &&str)>| {
        pairs.take_while(|(one, other)| one == other).count()
    };
    let before = equal(&mut old.iter().zip(&new));
    let rest = old.len().min(new.len()) - before;
    let after = equal(&mut old.iter().rev().zip(new.iter().rev())).min(rest);
    let middle = |lines: &[&str], sign: char| -> Vec<String> {
        let count = lines.len() - before - after;
        let lines = lines.iter().skip(before).take(count);
        lines.map(|line| format!("  {sign} {line}")).collect()
    };
    [middle(&old, '-'), middle(&new, '+')].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_what_lies_between_equal_lines() {
        assert_eq!(
            difference("a\nb\nc", "a\nx\ny\nc"),
            ["  - b", "  + x", "  + y"]
        );
        assert_eq!(difference("a\na", "a"), ["  - a"]);
        assert_eq!(difference("a", "a"), [""; 0]);
    }
}

//! `cargo xtask fuzz`: feeds the readers of everything that comes from outside what no client
//! sends. Owns cargo-fuzz's options; the targets are in `fuzz/`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use clap::Args;
use testbed::products::{cargo, workspace};

const VERSION: &str = "^0.13";

/// Options of `cargo xtask fuzz`
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How long each target runs, beside the kept corpus
    #[arg(long, value_name = "S", default_value_t = 60)]
    seconds: u32,
    /// Add to the kept corpus, in fuzz/corpus, what reaches code that it does not
    #[arg(long)]
    keep: bool,
    /// The targets to run; all of them if none is named
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
}

/// Runs the targets one after the other; the first finding ends it.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let known = targets()?;
    for target in &options.targets {
        ensure!(
            known.contains(target),
            "there is no fuzz target {target}; there are {}",
            known.join(", ")
        );
    }
    let fuzz = install()?;
    let chosen = if options.targets.is_empty() {
        &known
    } else {
        &options.targets
    };
    for target in chosen {
        let (found, kept) = (
            workspace().join("target/fuzz").join(target),
            workspace().join("fuzz/corpus").join(target),
        );
        fs::create_dir_all(&found)?;
        fs::create_dir_all(&kept)?;
        let time = format!("-max_total_time={}", options.seconds);
        let told = go(
            &fuzz,
            target,
            &[&found, &kept],
            &[&time, "-print_final_stats=1"],
        )?;
        println!("{target:12} {:>12} executions", executions(&told));
        if options.keep {
            // By edges alone: a corpus to keep in git, not one to be complete.
            let merge = ["-set_cover_merge=1", "-use_counters=0", "-use_cmp=0"];
            go(&fuzz, target, &[&kept, &found], &merge)?;
        }
    }
    Ok(())
}

/// Runs cargo-fuzz on one target and returns what it printed.
fn go(
    fuzz: &Path,
    target: &str,
    corpora: &[&PathBuf],
    arguments: &[&str],
) -> anyhow::Result<String> {
    let output = Command::new(fuzz)
        // Instrumentation is for nightly compilers only, in name.
        .env("RUSTC_BOOTSTRAP", "1")
        .current_dir(workspace())
        // The code is safe Rust: what a sanitizer would find is not what we look for, and it costs
        // half the speed.
        .args(["run", "--sanitizer", "none", target])
        .args(corpora)
        .arg("--")
        .args(arguments)
        .args(["-timeout=10", "-rss_limit_mb=1024"])
        .output()
        .context("cannot run cargo-fuzz")?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.success(),
        "fuzz target {target} found something, or does not build; what it found is in fuzz/artifacts/{target}\n{told}"
    );
    Ok(told)
}

fn executions(told: &str) -> &str {
    told.lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))
        .map_or("?", str::trim)
}

fn targets() -> anyhow::Result<Vec<String>> {
    let directory = workspace().join("fuzz/fuzz_targets");
    let mut names = fs::read_dir(&directory)
        .with_context(|| directory.display().to_string())?
        .map(|entry| Ok(entry?.path().with_extension("")))
        .map(|path: anyhow::Result<PathBuf>| {
            let path = path?;
            Ok(path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into())
        })
        .collect::<anyhow::Result<Vec<String>>>()?;
    names.sort_unstable();
    Ok(names)
}

/// cargo-fuzz, compiled into the target directory on first use.
fn install() -> anyhow::Result<PathBuf> {
    let root = workspace().join("target/tools");
    let program = root.join("bin/cargo-fuzz");
    if !program.is_file() {
        println!("Installing cargo-fuzz into {}", root.display());
        let status = cargo()
            .args(["install", "--quiet", "--locked", "--debug", "--root"])
            .arg(&root)
            .args(["--version", VERSION, "cargo-fuzz"])
            .status()?;
        ensure!(status.success(), "cargo-fuzz does not install");
    }
    Ok(program)
}

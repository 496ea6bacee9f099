//! `crowd`: thousands of containers with three streams each, whose daemon is replaced: for the
//! guest of `cargo xtask test-systemd`, where the limits of a machine are not those of a test.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::ensure;
use clap::Parser;
use embedshim_tests::{Crowd, Kind, Stored, raise_open_files};

/// So many containers run, and the rest of them are created only, which takes half of the time.
const RUNNING: usize = 100;

/// What becomes of many containers
#[derive(Debug, Parser)]
enum Options {
    /// Demands that the streams of many containers flow through two daemons, one after the other
    Replace(Replace),
}

#[derive(Debug, clap::Args)]
struct Replace {
    /// Where the daemon serves
    #[arg(long)]
    state_dir: PathBuf,
    /// Where the bundles are made
    #[arg(long)]
    directory: PathBuf,
    /// The compiled `echo_runtime.c`
    #[arg(long)]
    runtime: PathBuf,
    /// How many containers
    #[arg(long)]
    containers: usize,
    /// How many descriptors the store has to hold then
    #[arg(long, default_value_t = 0)]
    descriptors: usize,
    /// The pid of the process that holds them
    #[arg(long)]
    store: i32,
    /// The command, bash's, that replaces the daemon
    #[arg(long)]
    command: String,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    raise_open_files()?;
    match options {
        Options::Replace(options) => replace(&options),
    }
}

fn replace(options: &Replace) -> anyhow::Result<()> {
    let began = Instant::now();
    let before = Stored::by(options.store)?;
    let mut crowd = Crowd::new(
        &options.state_dir,
        "crowd",
        &options.directory,
        &options.runtime,
    )?;
    crowd.add(RUNNING, Kind::Running)?;
    println!("{RUNNING} run after {:?}", began.elapsed());
    crowd.add(options.containers.saturating_sub(RUNNING), Kind::Created)?;
    println!("created after {:?}", began.elapsed());
    let stored = Stored::by(options.store)?.since(before);
    println!("{stored:?}");
    ensure!(
        stored.entries >= 3 * options.containers && stored.all() >= options.descriptors,
        "fewer are stored than {} in three entries for each container",
        options.descriptors
    );
    let replaced = Command::new("bash")
        .args(["-euc", &options.command])
        .status()?;
    ensure!(replaced.success(), "the daemon is not replaced: {replaced}");
    println!("replaced after {:?}", began.elapsed());
    crowd.ensure_flowing()?;
    println!("all streams flow after {:?}", began.elapsed());
    Ok(())
}

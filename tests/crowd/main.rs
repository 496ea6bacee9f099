//! `crowd`: thousands of containers with three streams each. `replace` is for the guest of `cargo
//! xtask test-systemd`, where the limits of a machine are not those of a test; `memory` is for
//! `cargo xtask bench`, which builds the binaries it measures.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use embedshim_tests::{Crowd, Kind, Stored, raise_open_files};
use testbed::image;
use testbed::sandbox::{EMBEDSHIM, Sandbox, clean_up_all, clean_up_on_signals};

/// So many containers run, and the rest of them are created only, which takes half of the time.
const RUNNING: usize = 100;
/// An idle daemon has given its threads back after this.
const REST: Duration = Duration::from_secs(4);

/// What becomes of many containers, and what they cost
#[derive(Debug, Parser)]
enum Options {
    /// Demands that the streams of many containers flow through two daemons, one after the other
    Replace(Replace),
    /// Measures the memory of a daemon that an idle container, and its streams, take
    Memory {
        /// Directory of the binaries
        binaries: PathBuf,
        /// How many containers without streams, and then with three each
        #[arg(long, default_value_t = 400)]
        containers: usize,
    },
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
        Options::Memory {
            binaries,
            containers,
        } => {
            clean_up_on_signals()?;
            let measured = memory(&binaries, containers);
            clean_up_all();
            measured
        }
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

fn memory(binaries: &Path, containers: usize) -> anyhow::Result<()> {
    let sandbox = Sandbox::new(binaries, EMBEDSHIM)?;
    sandbox.start_daemon()?;
    let runtime = sandbox.directory().join("echo");
    image::compile_echo_runtime(&runtime)?;
    let (state_dir, directory) = (sandbox.state_dir(), sandbox.directory());
    let mut crowd = Crowd::new(&state_dir, sandbox.namespace(), directory, &runtime)?;
    // Of a successor, whose heap has no holes that an earlier peak has left.
    let private = || -> anyhow::Result<f64> {
        let daemon = sandbox.kill_daemon()?;
        sleep(REST);
        private_kilobytes(daemon)
    };
    let none = private()?;
    crowd.add(containers, Kind::Silent)?;
    let without = private()?;
    crowd.add(containers, Kind::Running)?;
    let with = private()?;
    crowd.ensure_flowing()?;
    sleep(REST);
    let used = private_kilobytes(sandbox.daemon_pid().context("the daemon is not there")?)?;
    let each = |kilobytes: f64| kilobytes / u32::try_from(containers).map_or(1.0, f64::from);
    println!("memory of the daemon for one of {containers} idle containers");
    println!("  without streams        {:5.1} kB", each(without - none));
    println!(
        "  three streams          {:5.1} kB more; {:.1} kB once something has flowed",
        each(with - without) - each(without - none),
        each(used - without) - each(without - none)
    );
    Ok(())
}

/// What is the process's alone.
fn private_kilobytes(pid: i32) -> anyhow::Result<f64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let of = |name: &str| {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| {
            line.trim()
                .trim_end_matches("kB")
                .trim()
                .parse::<f64>()
                .ok()
        })
    };
    let sum = of("Private_Clean:").zip(of("Private_Dirty:"));
    let (clean, dirty) = sum.context("no private memory")?;
    Ok(clean + dirty)
}

//! `cargo xtask bench`: ours and containerd's own shim side by side, in the same run, alternating.
//! Ratios count; the absolute numbers are the machine's.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use testbed::products::{self, Profile};
use testbed::sandbox::{EMBEDSHIM, PATIENCE, RUNC_V2, Running, Sandbox};
use testbed::{image, machine};

use crate::demo::{processes_named, pss};
use crate::exit_cost;

/// Options of `cargo xtask bench`.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// How often `ctr run --rm ... true` is timed with each runtime
    #[arg(long, default_value_t = 30)]
    runs: u32,
    /// How many containers run while memory is measured
    #[arg(long, default_value_t = 50)]
    containers: u32,
}

/// Measures and prints a table.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    machine::prepare()?;
    let binaries = products::build(Profile::Release)?;
    let image = tempfile::tempdir()?;
    let archive = image::build(image.path())?;
    let ours = Sandbox::start(&binaries, EMBEDSHIM, &archive)?;
    let theirs = Sandbox::start(&binaries, RUNC_V2, &archive)?;
    latency(&ours, &theirs, options.runs)?;
    exit_cost::print()?;
    memory(&ours, &theirs, options.containers)?;
    // Its containers would slow down what comes next.
    drop((ours, theirs));
    // What idle streams cost, how long a killed daemon is missed, and how fast output is.
    measure_with("crowd", &["memory"], &binaries)?;
    measure_with("takeover", &[], &binaries)?;
    measure_with("throughput", &[], &binaries)
}

/// By a program that speaks the shim API itself, since containerd and ctr would blur what is
/// measured.
fn measure_with(program: &str, command: &[&str], binaries: &Path) -> anyhow::Result<()> {
    let status = products::cargo()
        .args(["run", "--quiet", "--package", "embedshim-tests"])
        .args(["--bin", program, "--"])
        .args(command)
        .arg(binaries)
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "{program} cannot measure");
    Ok(())
}

fn latency(ours: &Sandbox, theirs: &Sandbox, runs: u32) -> anyhow::Result<()> {
    let mut times = [Vec::new(), Vec::new()];
    // One of each to warm up; ours starts the daemon in it.
    for run in 0..=runs {
        for (sandbox, times) in [ours, theirs].into_iter().zip(&mut times) {
            let took = time_one(sandbox, &format!("true{run}"))?;
            if run > 0 {
                times.push(took);
            }
        }
    }
    let [ours, theirs] = times.map(median);
    println!("median of {runs} `ctr run --rm ... true`, alternating");
    println!("  embed.v1  {:7.1} ms", milliseconds(ours));
    println!("  runc.v2   {:7.1} ms", milliseconds(theirs));
    println!(
        "  ratio     {:7.2}",
        milliseconds(ours) / milliseconds(theirs)
    );
    Ok(())
}

fn time_one(sandbox: &Sandbox, id: &str) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let finished =
        Running::capture(&mut sandbox.run(&["--rm"], id, &["true"]))?.finish(PATIENCE)?;
    ensure!(
        finished.code == Some(0),
        "{} {finished:?}",
        sandbox.runtime()
    );
    Ok(began.elapsed())
}

fn memory(ours: &Sandbox, theirs: &Sandbox, containers: u32) -> anyhow::Result<()> {
    let daemon = ours.daemon_pid().context("the daemon is not there")?;
    let keeper = ours.keeper_pid().context("the keeper is not there")?;
    let both = || anyhow::Ok(pss(daemon)? + pss(keeper)?);
    let idle = both()?;
    fill(ours, containers)?;
    let full = both()?;
    fill(theirs, containers)?;
    let shims = shims_pss(theirs)?;
    println!("memory (Pss) for {containers} containers");
    println!("  embed.v1  {full:7} kB in daemon and keeper; {idle} kB with none");
    println!("  runc.v2   {shims:7} kB in {containers} shims");
    Ok(())
}

fn fill(sandbox: &Sandbox, containers: u32) -> anyhow::Result<()> {
    for number in 0..containers {
        sandbox.detached(&[], &format!("c{number}"), &["sleep", "1000"])?;
    }
    Ok(())
}

/// The sum over all Go shims of the sandbox.
fn shims_pss(sandbox: &Sandbox) -> anyhow::Result<u64> {
    let shims = processes_named("containerd-shim-runc-v2", sandbox.directory())?;
    shims.into_iter().map(pss).sum()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

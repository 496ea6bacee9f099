//! What the exit of a process costs that is not watched: the kernel's own count of the time spent
//! in our BPF programs. A part of `cargo xtask bench`; never loads a program itself.

use std::os::fd::{AsFd, AsRawFd};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use aya::programs::loaded_programs;
use aya::sys::{Stats, enable_stats};

/// What the programs' names begin with, in `crates/monitor-bpf/bpf`.
const PROGRAMS: &str = "record_exit";
const EXITS: u64 = 3000;

/// What the kernel has counted (Linux 5.1), while it is asked to (Linux 5.8).
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    programs: u64,
    runs: u64,
    nanoseconds: u64,
}

/// Measures and prints; a daemon has to have its programs loaded.
pub(crate) fn print() -> anyhow::Result<()> {
    let _counting = enable_stats(Stats::RunTime).context("the kernel does not count")?;
    let before = Count::now()?;
    let begin = Instant::now();
    ensure!(before.programs > 0, "no program of ours is loaded");
    for _ in 0..EXITS {
        Command::new("/bin/true")
            .stdin(Stdio::null())
            .status()
            .context("/bin/true")?;
    }
    let life = begin.elapsed().as_micros() / u128::from(EXITS);
    let after = Count::now()?;
    let runs = after.runs.saturating_sub(before.runs);
    ensure!(runs >= EXITS, "the programs were not run");
    let each = after.nanoseconds.saturating_sub(before.nanoseconds) / runs;
    println!("exit of a process that is not watched");
    println!("  BPF       {each:7} ns in each of three copies of the program, {runs} runs counted");
    println!("  /bin/true {life:7} us from its fork to its end");
    Ok(())
}

impl Count {
    fn now() -> anyhow::Result<Self> {
        let mut sum = Self::default();
        for program in loaded_programs() {
            // One that is unloaded meanwhile is none of ours.
            let Ok(program) = program else { continue };
            let is_ours = program
                .name_as_str()
                .is_some_and(|name| name.starts_with(PROGRAMS));
            let Some(fd) = program.fd().ok().filter(|_| is_ours) else {
                continue;
            };
            let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
            let info = std::fs::read_to_string(&path).context(path)?;
            sum.programs += 1;
            sum.runs += field(&info, "run_cnt:");
            sum.nanoseconds += field(&info, "run_time_ns:");
        }
        Ok(sum)
    }
}

fn field(info: &str, name: &str) -> u64 {
    let value = info.lines().find_map(|line| line.strip_prefix(name));
    value
        .and_then(|value| value.trim().parse().ok())
        .unwrap_or_default()
}

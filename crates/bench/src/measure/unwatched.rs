//! What the exit of a process costs that is not watched: the kernel's own count of the time spent
//! in our BPF programs, which run at every exit on the machine.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;

use anyhow::{Context, ensure};
use aya::programs::loaded_programs;
use aya::sys::{Stats, enable_stats};

use super::Bench;
use crate::report::{OURS, Unit};
use crate::subject::spawn::succeed;

/// What the programs' names begin with, in `crates/monitor-bpf/bpf`.
const PROGRAMS: &str = "record_exit";
const EXITS: u64 = 200;

/// What the kernel has counted (Linux 5.1), while it is asked to (Linux 5.8).
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    programs: u64,
    runs: u64,
    nanoseconds: u64,
}

pub(super) fn measure(bench: &mut Bench<'_>) -> anyhow::Result<()> {
    let _counting = enable_stats(Stats::RunTime).context("the kernel does not count")?;
    let nothing = bench.ground.directory().join("rootfs/bin/true");
    for _ in 0..bench.rounds(10, 3).min(10) {
        let before = Count::now()?;
        ensure!(before.programs > 0, "no program of embedshim is loaded");
        for _ in 0..EXITS {
            succeed(&mut Command::new(&nothing))?;
        }
        let after = Count::now()?;
        let runs = after.runs.saturating_sub(before.runs);
        ensure!(runs >= EXITS, "the programs were not run");
        let each = after.nanoseconds.saturating_sub(before.nanoseconds) / runs;
        let each = f64::from(u32::try_from(each)?);
        let name = "exit that is not watched, in each program";
        bench.recorder.record(name, OURS, Unit::Nanoseconds, each);
    }
    Ok(())
}

impl Count {
    fn now() -> anyhow::Result<Self> {
        let mut sum = Self::default();
        for program in loaded_programs() {
            // One that is unloaded meanwhile is none of embedshim's.
            let Ok(program) = program else { continue };
            let is_ours = program
                .name_as_str()
                .is_some_and(|name| name.starts_with(PROGRAMS));
            let Some(fd) = program.fd().ok().filter(|_| is_ours) else {
                continue;
            };
            let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
            let info = fs::read_to_string(&path).context(path)?;
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

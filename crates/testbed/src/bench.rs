//! `cargo xtask bench`: builds the product and the program that measures it, and runs that. Owns
//! the options, which the program reads as well: it is given the same command line.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};

use crate::machine;
use crate::products::{self, Profile};

/// Where the program finds the binaries that it measures.
pub const BINARIES: &str = "EMBEDSHIM_BENCH_BINARIES";

/// What the help says.
pub const ABOUT: &str = "\
Measure embedshim beside containerd's shims, the Rust shim, and bare OCI runtimes, in one run.

Every shim is driven directly over ttrpc, and by containerd too. They take turns (A B A B), with the floor \
among them: the same calls of runc, without any shim. So a machine that is busy for a while is busy for all, \
and the ratios to the floor are what counts. Counts (system calls, context switches, bytes) are those of the \
kernel, and hardly depend on the machine's load.

Without an option everything is measured that is on the machine or can be fetched; that takes half an hour. What is \
not measured is named with its reason.";

/// Options of `cargo xtask bench`.
#[derive(Args, Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "they are flags of a command line"
)]
pub struct Options {
    /// Measure what changes most often, with fewer rounds: three minutes
    #[arg(long)]
    pub quick: bool,
    /// Count system calls, context switches and bytes only, and fail beyond the checked-in limits
    /// (crates/bench/limits.toml); for CI, where times mean nothing
    #[arg(long, conflicts_with_all = ["quick", "page", "parts"])]
    pub counts_only: bool,
    /// Measure these parts only; all if none is named
    #[arg(long = "part", value_enum, value_name = "PART")]
    pub parts: Vec<Part>,
    /// Measure these beside ours and the floor, such as "go 1.6"; all if none is named
    #[arg(long = "peer", value_name = "NAME")]
    pub peers: Vec<String>,
    /// How many rounds of lives; the other parts have their own numbers
    #[arg(long, value_name = "N")]
    pub rounds: Option<u32>,
    /// The largest number of containers whose growth is measured
    #[arg(long, value_name = "N")]
    pub containers: Option<u64>,
    /// Write everything that was found to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Measure what a pod costs instead, through containerd 2.x: with a pause container under
    /// runc-v2 and under embedshim, and without one
    #[arg(long, conflicts_with_all = ["quick", "counts_only", "page", "parts", "peers", "containers", "from"])]
    pub pods: bool,
    /// Write docs/benchmarks.md and its plots, of this run or of the file of --from
    #[arg(long)]
    pub page: bool,
    /// Measure nothing: take what other runs have written by --json; a figure that several have is
    /// the first one's
    #[arg(long, value_name = "FILE")]
    pub from: Vec<PathBuf>,
    /// Measure nothing: say what got worse from the first to the second file, beyond their spread
    #[arg(long, num_args = 2, value_names = ["A.json", "B.json"], exclusive = true)]
    pub compare: Option<Vec<PathBuf>>,
}

/// What is measured together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// A container's life with one exec, phase by phase
    Lives,
    /// System calls, context switches and time on a processor of a life
    Counts,
    /// Lives per second, 1 to 32 at once, and State meanwhile
    Rates,
    /// State of an idle shim
    State,
    /// 200 containers that end at once
    Exits,
    /// Memory with 0, 50 and 500 containers, and afterwards
    Memory,
    /// From kill -9 of the daemon to its answers
    Takeover,
    /// Everything with thousands of containers
    Growth,
    /// Lives on a machine with thousands of mounts
    Mounts,
    /// `ctr run` by each containerd
    Containerd,
    /// Output of a process by fifo, file and terminal
    Output,
    /// What our BPF program adds to the exits of all other processes
    Unwatched,
    /// Memory of the streams of idle containers
    Streams,
}

impl Options {
    /// Whether this part is to be measured.
    pub fn has(&self, part: Part) -> bool {
        if self.counts_only {
            return [Part::Counts, Part::Memory].contains(&part);
        }
        if !self.parts.is_empty() {
            return self.parts.contains(&part);
        }
        !(self.quick && [Part::Growth, Part::Mounts, Part::Streams].contains(&part))
    }

    /// Whether a report is only read.
    fn measures(&self) -> bool {
        self.compare.is_none() && self.from.is_empty()
    }
}

/// Builds and runs the program.
pub fn run(options: &Options) -> anyhow::Result<()> {
    if options.pods {
        return run_pods(options);
    }
    let program = products::build_test_program("embedshim-bench")?;
    let mut bench = Command::new(program);
    bench.args(std::env::args_os().skip(2));
    // Cargo sets it. Each program that is measured would look for its libraries in six directories
    // first, with 90 system calls.
    bench.env_remove("LD_LIBRARY_PATH");
    if options.measures() {
        machine::prepare()?;
        bench.env(BINARIES, products::build(Profile::Release)?);
    }
    let status = bench.status().context("cannot run the bench")?;
    if !status.success() {
        bail!("the bench failed");
    }
    Ok(())
}

fn run_pods(options: &Options) -> anyhow::Result<()> {
    machine::prepare()?;
    let binaries = products::build(Profile::Release)?;
    let mut costs = Command::new(products::build_test_program("pod-costs")?);
    costs.arg("--binaries").arg(binaries);
    if let Some(rounds) = options.rounds {
        costs.args(["--rounds", &rounds.to_string()]);
    }
    if let Some(file) = &options.json {
        costs.arg("--json").arg(file);
    }
    let status = costs.status().context("cannot run pod-costs")?;
    if !status.success() {
        bail!("the bench of pods failed");
    }
    Ok(())
}

//! `cargo xtask chaos`: builds the product with failpoints and the chaos suite, and runs it. Owns
//! the options, which the suite reads as well: it is given the same command line.

use std::process::Command;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};

use crate::machine;
use crate::products::{self, Profile};

/// Where the suite finds the binaries that it kills.
pub const BINARIES: &str = "EMBEDSHIM_TEST_BINARIES";

/// What the help says.
pub const ABOUT: &str = "\
Kill what serves containers while they live, and check a ledger of what is due.

Workers start, exec, pause, kill and delete containers, directly over ttrpc and through containerd, while \
embedshimd is killed, frozen and ended at random instants, in bursts too, calls of runc are killed and frozen, \
and containerd is restarted. Some containers make pods, some go on from a checkpoint. The ledger knows with which code every process ends: each must be told, each request answered, and in \
the end nothing may be left (processes, mounts, cgroups, files, descriptors).

Before that the daemon is single-stepped: the same lives again and again, and each time it dies at the next \
step that lasts. After it, containerd is stopped and keeper and daemon are killed: what ends then is \
known afterwards.

The seed is printed first. It determines what every worker does and what the killer does and when, but not \
what the machine makes of it: the same seed is the same plan, not the same run. Single steps are \
exactly the same again.";

/// Options of `cargo xtask chaos`.
#[derive(Args, Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch of the command line"
)]
pub struct Options {
    /// How long the storm takes; the single steps and the blackout come on top
    #[arg(long, default_value_t = 0.7, value_name = "N")]
    pub minutes: f64,
    /// Determines the plan; without it, a new one
    #[arg(long, value_name = "S", default_value_t = fresh_seed())]
    seed: u64,
    /// Workers that speak ttrpc
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub direct: u64,
    /// Workers that use containerd; with 0 there is none
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub containerd: u64,
    /// Run these phases only; all if none is named
    #[arg(long = "phase", value_enum, value_name = "PHASE")]
    pub phases: Vec<Phase>,
    /// Single-step through everything, instead of the steps that the seed chooses; takes some
    /// minutes
    #[arg(long)]
    pub every_step: bool,
    /// Without --every-step, one of so many steps is taken
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub stride: u64,
    /// Take the single steps of these lives only, such as "terminal input"
    #[arg(long = "life", value_name = "NAME")]
    pub lives: Vec<String>,
    /// Take the single steps after one that fails, too
    #[arg(long)]
    pub go_on: bool,
    /// Kill nothing: what fails then is the suite, or a defect that needs no chaos
    #[arg(long)]
    pub no_kills: bool,
    /// Leave the sandbox of a run that has failed, with everything that runs in it
    #[arg(long)]
    pub keep: bool,
}

/// A part of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Phase {
    /// The daemon dies at each of its steps
    Steps,
    /// Workers, and a killer
    Storm,
    /// Containerd is stopped, keeper and daemon are killed
    Blackout,
}

impl Options {
    /// What determines the plan.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Whether this part is to be run.
    pub fn has(&self, phase: Phase) -> bool {
        self.phases.is_empty() || self.phases.contains(&phase)
    }
}

/// The same for every caller within this process.
fn fresh_seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        // Short enough to be typed.
        now.as_millis().try_into().unwrap_or(1_u64) % 10_000_000
    })
}

/// Builds and runs the suite.
pub fn run(options: &Options) -> anyhow::Result<()> {
    machine::prepare()?;
    let binaries = products::build(Profile::Dev)?;
    let mut chaos = Command::new(products::build_test_program("chaos")?);
    // As it was typed, and the seed that this process has made.
    chaos.args(std::env::args_os().skip(2));
    if !std::env::args().any(|word| word == "--seed" || word.starts_with("--seed=")) {
        chaos.args(["--seed", &options.seed.to_string()]);
    }
    let status = chaos
        .env(BINARIES, binaries)
        .status()
        .context("cannot run the chaos suite")?;
    if !status.success() {
        bail!("the chaos suite failed");
    }
    Ok(())
}

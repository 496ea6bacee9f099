//! The chaos suite: containers live by the dozen while what serves them is killed, and a ledger
//! knows what is due. `cargo xtask chaos` builds and runs it. Owns the order of the phases, and
//! what is kept of a run that has failed.

mod attempts;
mod blackout;
mod bundle;
mod checkpoints;
mod client;
mod containerd;
mod daemon;
mod direct;
mod events;
mod execs;
mod fifo;
mod ground;
mod killer;
mod ledger;
mod leftovers;
mod logger;
mod plan;
mod pods;
mod program;
mod random;
mod runtime_killer;
mod runtimes;
mod sandboxes;
mod sequence;
mod steps;
mod storm;
mod streams;
mod summary;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use testbed::chaos::{Options, Phase};
use testbed::products::workspace;
use testbed::sandbox::{clean_up_all, clean_up_on_signals};
use testbed::{chaos, image};

use ground::Ground;
use leftovers::Before;
use plan::{End, Life, ProcessPlan};
use program::Program;

#[derive(Debug, Parser)]
#[command(name = "chaos")]
struct Cli {
    #[command(flatten)]
    options: Options,
}

fn main() -> ExitCode {
    let options = Cli::parse().options;
    let result = clean_up_on_signals().and_then(|()| run(&options));
    clean_up_all();
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> anyhow::Result<bool> {
    println!("seed {}", options.seed());
    let binaries = std::env::var_os(chaos::BINARIES)
        .with_context(|| format!("{} is not set: use cargo xtask chaos", chaos::BINARIES))?;
    let began = Instant::now();
    let image = tempfile::tempdir()?;
    let archive = image::build(image.path())?;
    let archive = (options.containerd > 0).then_some(archive.as_path());
    let ground = Ground::set(Path::new(&binaries), image.path(), archive)?;
    ground.ledger.note(&format!("seed {}", options.seed()));
    if let Err(error) = play(&ground, options) {
        ground.ledger.failure(&format!("{error:#}"));
    }
    let counts = ground.ledger.counts();
    let passed = summary::print(options.seed(), began.elapsed().as_secs_f64(), &counts);
    if !passed {
        let directory = workspace().join(format!("target/chaos/{}", options.seed()));
        ground.save(&directory)?;
        println!("logs and ledger: {}", directory.display());
        if options.keep {
            println!(
                "the sandbox, in which all goes on: {}",
                ground.keep().display()
            );
        }
    }
    Ok(passed)
}

fn play(ground: &Ground, options: &Options) -> anyhow::Result<()> {
    ensure!(
        options.no_kills || ground.daemons.keeper().is_some(),
        "no keeper holds the daemon's descriptors: try --no-kills"
    );
    let has_containerd = options.containerd > 0;
    warm_up(ground, has_containerd)?;
    let before = Before::look(ground, has_containerd);
    if options.has(Phase::Steps) && !options.no_kills {
        println!("single steps");
        steps::take(ground, options)?;
        compare(ground, &before, "after the single steps")?;
    }
    if options.has(Phase::Storm) && !ground.ledger.has_failures() {
        let time = Duration::from_secs_f64(60.0 * options.minutes);
        println!("storm of {:.0} s", time.as_secs_f64());
        storm::blow(ground, options, time);
        compare(ground, &before, "after the storm")?;
    }
    if !ground.ledger.has_failures() {
        events::check(ground)?;
    }
    if options.has(Phase::Blackout) && !ground.ledger.has_failures() && !options.no_kills {
        println!("blackout");
        blackout::happen(ground, has_containerd)?;
        compare(ground, &before, "after the blackout")?;
    }
    Ok(())
}

/// What a life that has failed leaves behind says nothing new.
fn compare(ground: &Ground, before: &Before, when: &'static str) -> anyhow::Result<()> {
    if ground.ledger.has_failures() {
        return Ok(());
    }
    before.compare(ground).context(when)
}

/// What the first container costs once for all, such as the cgroup of the namespace and the
/// directory of console sockets, is not a leftover.
fn warm_up(ground: &Ground, has_containerd: bool) -> anyhow::Result<()> {
    let program = Program::Exit {
        code: 1,
        after_ms: 0,
    };
    let init = ProcessPlan::plain(program, End::Itself);
    for init in [init, init.on_terminal()] {
        direct::live(ground, "first", &Life::of_init(init));
    }
    sandboxes::warm_up(ground)?;
    if has_containerd {
        let sandbox = ground.sandbox();
        sandbox.detached(&[], "first", &["true"])?;
        sandbox.wait_for_status("first", "STOPPED")?;
        sandbox.delete_task("first")?;
        sandbox.ctr_ok(&["container", "rm", "first"])?;
    }
    Ok(())
}

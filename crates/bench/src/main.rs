//! `embedshim-bench`: measures our shim, those of others, and the bare runtime below them, side by
//! side. `cargo xtask bench` builds and runs it. Owns what a run consists of, and what becomes of
//! its report.

mod client;
mod count;
mod measure;
mod process;
mod report;
mod share;
mod statistics;
mod subject;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Parser;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use testbed::bench::{ABOUT, BINARIES, Options};
use testbed::sandbox::{clean_up_all, clean_up_on_signals};

use count::Counter;
use measure::Bench;
use report::limits::{CHECKED_IN, Limits};
use report::machine::{Machine, load};
use report::{FORMAT, Report, compare, page, table};
use subject::{Ground, Subject, choose};

/// Measures embedshim
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench", long_about = ABOUT, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    options: Options,
}

fn main() -> ExitCode {
    let Cli { options } = Cli::parse();
    let result = run(&options);
    clean_up_all();
    share::give_back();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> anyhow::Result<()> {
    if let Some([before, after]) = options.compare.as_deref() {
        print!("{}", compare::describe(&read(before)?, &read(after)?));
        return Ok(());
    }
    let (report, is_whole) = match options.from.split_first() {
        Some((first, others)) => {
            let others = others.iter().map(|file| read(file));
            let merged = others.fold(read(first), |all, other| Ok(all?.merge(other?)))?;
            (merged, Ok(()))
        }
        None => measure(options)?,
    };
    // Also if a part has failed: those before it took their time.
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&report)?;
        fs::write(file, text + "\n").with_context(|| file.display().to_string())?;
    }
    if options.page && is_whole.is_ok() {
        page::write(&report)?;
    }
    println!("\n{}\n", report.machine.sentence());
    print!("{}", table::overview(&report, &[]));
    is_whole?;
    if options.counts_only {
        println!();
        return Limits::parse(CHECKED_IN)?.check(&report);
    }
    Ok(())
}

/// Measures. Beside what was found is whether that is all, or why it is not.
fn measure(options: &Options) -> anyhow::Result<(Report, anyhow::Result<()>)> {
    let binaries = std::env::var_os(BINARIES).map(PathBuf::from);
    let binaries = binaries.with_context(|| format!("{BINARIES} is not set"))?;
    leave_the_machine_alone()?;
    clean_up_on_signals()?;
    let began = Instant::now();
    let mut machine = Machine::here();
    // Before whatever is to be counted is started.
    let counter = Counter::new();
    if let Err(error) = &counter {
        println!("nothing is counted: {error:#}");
        ensure!(!options.counts_only, "nothing can be counted");
    }
    let (subjects, figures, is_whole) = measure_on(options, &binaries, counter.ok())?;
    machine.load_after = load();
    machine.seconds = began.elapsed().as_secs();
    let report = Report {
        format: FORMAT,
        machine,
        subjects,
        figures,
    };
    Ok((report, is_whole))
}

fn measure_on(
    options: &Options,
    binaries: &Path,
    counter: Option<Counter>,
) -> anyhow::Result<(
    Vec<report::SubjectInfo>,
    Vec<report::Figure>,
    anyhow::Result<()>,
)> {
    let ground = Ground::new(binaries)?;
    let chosen = choose(options, &ground, binaries)?;
    let mut bench = Bench::new(options, &ground, binaries, &chosen, counter);
    let is_whole = measure::run(&mut bench);
    let figures = bench.recorder.finish();
    for subject in &chosen.subjects {
        if let Subject::Bare(bare) = subject {
            // Empty, unless something failed.
            let _ = fs::remove_dir(bare.root(&ground));
        }
    }
    Ok((chosen.infos, figures, is_whole))
}

/// The bench's mounts are not the machine's, and those of others do not come meanwhile. Many
/// connections need many descriptors.
fn leave_the_machine_alone() -> anyhow::Result<()> {
    if let Err(error) = share::take() {
        println!("subjects may get other shares of the processors than each other: {error:#}");
    }
    unshare(CloneFlags::CLONE_NEWNS).context("unshare")?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).context("/")?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?)
}

fn read(file: &Path) -> anyhow::Result<Report> {
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let report: Report = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
    ensure!(
        report.format == FORMAT,
        "{}: format {}",
        file.display(),
        report.format
    );
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_help_says_what_is_measured() {
        insta::assert_snapshot!(Cli::command().render_long_help());
    }
}

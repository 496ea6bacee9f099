//! `cargo xtask`: everything that is done with this repository goes through here.

mod api;
mod deb;
mod demo;
mod dist;
mod foreign;
mod fuzz;
mod matrix;
mod package;
mod programs;
mod results;
mod rpm;
mod sbom;
mod shipped;
mod suite;
mod systemd;
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use testbed::{bench, chaos};

/// Builds, tests and demonstrates embedshim
///
/// Run as root: containers, BPF and mounts need it. What is missing on Debian is installed by apt,
/// after saying what.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Install what building and testing need, and mount bpffs
    Setup,
    /// Show, step by step, what embedshim does, against a private containerd
    Demo,
    /// Run every test
    Test(suite::Options),
    /// Kill what serves containers while they live, and check a ledger of what is due
    #[command(long_about = chaos::ABOUT)]
    Chaos(chaos::Options),
    /// Boot other kernels in QEMU and run the exit monitors' suite and whole containers there
    TestMatrix(matrix::Options),
    /// Boot a Debian guest with systemd and test units, package and survival there
    TestSystemd(systemd::Options),
    /// Build the Debian package
    Deb(programs::Options),
    /// Build the package for systems with RPM
    Rpm(programs::Options),
    /// Build what a release has: the Debian package, an archive with install.sh, a bill of
    /// materials, checksums
    Dist(programs::Options),
    /// Package the library crates as for a registry; nothing is published
    Package(package::Options),
    /// Measure embedshim beside other shims and the bare runtime
    #[command(long_about = bench::ABOUT)]
    Bench(bench::Options),
    /// Fuzz everything that reads from outside: frames, requests, options, files
    Fuzz(fuzz::Options),
    /// Print what the library crates make public, or accept a change of it
    Api(api::Options),
    /// Check what lints can't: dependencies between crates, module headers, where unsafe is, the
    /// public API
    Tidy,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = testbed::sandbox::clean_up_on_signals().and_then(|()| match &cli.command {
        Command::Setup => suite::set_up(),
        Command::Demo => demo::run(),
        Command::Test(options) => suite::run(options),
        Command::Chaos(options) => chaos::run(options),
        Command::TestMatrix(options) => matrix::run(options),
        Command::TestSystemd(options) => systemd::run(options),
        Command::Deb(options) => deb::run(*options),
        Command::Rpm(options) => rpm::run(*options),
        Command::Dist(options) => dist::run(*options),
        Command::Package(options) => package::run(*options),
        Command::Bench(options) => bench::run(options),
        Command::Fuzz(options) => fuzz::run(options),
        Command::Api(options) => api::run(options),
        Command::Tidy => tidy::run(),
    });
    testbed::sandbox::clean_up_all();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

//! `embedshimd`: the node daemon, its keeper, and their commands. Composition only: command line,
//! configuration, the choice of an exit monitor. Decides nothing about a container: that is in the
//! library crates.

mod admin;
mod backend;
mod cli;
mod commands;
mod config;
mod daemon;
mod documents;
mod history;
mod keep;
mod limits;
mod logging;
mod metrics;
mod outcome;
mod probe;
mod service_manager;
mod signals;
mod state_dir;
mod sys;
mod traces;
mod upgrade;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};
use outcome::Failure;
use service_manager::activation::Activation;

fn main() -> ExitCode {
    // First of all: it changes the environment, which only a process with one thread can do safely.
    let activation = Activation::take();
    let cli = Cli::parse();
    let result = match &cli.command {
        Command::Keep(options) => {
            // Descriptors that were passed to a keeper by mistake are closed.
            drop(activation);
            keep::run(options)
        }
        Command::Serve(options) => daemon::run(options, activation),
        Command::Probe(options) => probe::run(options),
        Command::Status(options) => commands::status::run(options),
        Command::Ps(options) => commands::ps::run(options),
        Command::Inspect(options) => commands::inspect::run(options),
        Command::Events(options) => commands::events::run(options),
        Command::Metrics(options) => commands::metrics::run(options),
        Command::Watch(options) => commands::watch::run(options),
        Command::Pins(options) => commands::pins::run(options),
        Command::Report(options) => commands::report::run(options),
        Command::Config(options) => commands::config::run(options),
        Command::Upgrade(options) => upgrade::run(options),
        Command::Documents(options) => documents::run(options),
    };
    match result {
        Ok(code) => code.into(),
        Err(Failure { code, error }) => {
            eprintln!("embedshimd: {}", embedshim_core::chain(error.as_ref()));
            code.into()
        }
    }
}

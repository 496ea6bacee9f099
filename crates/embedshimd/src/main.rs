//! `embedshimd`: the node daemon. Composition only: configuration, command line, the choice of a backend.
//! What it composes lives in the library crates.

mod backend;
mod cli;
mod config;
mod daemon;
mod logging;
mod outcome;
mod probe;
mod sys;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};
use outcome::Failure;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.command {
        Command::Serve(options) => daemon::run(options),
        Command::Probe(options) => probe::run(options),
    };
    match result {
        Ok(code) => code.into(),
        Err(Failure { code, error }) => {
            eprintln!("embedshimd: {error:#}");
            code.into()
        }
    }
}

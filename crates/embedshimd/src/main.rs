//! `embedshimd`: the node daemon. Composition only: configuration, command line, the choice of a backend.
//! What it composes lives in the library crates.

mod backend;
mod cli;
mod config;
mod daemon;
mod keep;
mod logging;
mod outcome;
mod probe;
mod service_manager;
mod state_dir;
mod sys;
mod upgrade;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};
use outcome::Failure;
use service_manager::activation::Start;

fn main() -> ExitCode {
    // First of all: it changes the environment, which only a process of one thread can.
    let start = Start::take();
    let cli = Cli::parse();
    let result = match &cli.command {
        Command::Keep(options) => {
            // What somebody passed to a keeper is nobody's, and it closes what it does not know.
            drop(start);
            keep::run(options)
        }
        Command::Serve(options) => daemon::run(options, start),
        Command::Probe(options) => probe::run(options),
        Command::Upgrade(options) => upgrade::run(options),
    };
    match result {
        Ok(code) => code.into(),
        Err(Failure { code, error }) => {
            eprintln!("embedshimd: {}", embedshim_core::chain(error.as_ref()));
            code.into()
        }
    }
}

//! The launcher, `containerd-shim-embed-v1`. containerd executes it twice for every container, so
//! it is synchronous, quick, and leaves everything that lasts to the daemon. Owns the command line,
//! and what containerd reads from standard output (containerd's `core/runtime/v2/README.md`).
//!
//! containerd merges the standard error of `start` into its standard output: while it succeeds,
//! nothing but the address is ever written (invariant 12).

mod client;
mod daemon;
mod delete;
mod failure;
mod flags;
mod info;
pub mod location;
mod runtime;
mod start;

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::process::ExitCode;

use failure::Failure;
use flags::{Action, Flags};

/// The most bytes that are read of standard input: as long as ttrpc's longest message.
const MAX_STDIN: u64 = 4 << 20;

/// The whole program: arguments without the program's name in, exit code out.
pub fn run(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let output = Flags::parse(arguments).and_then(|flags| answer(&flags));
    let written = output.and_then(|bytes| Ok(io::stdout().lock().write_all(&bytes)?));
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!(
                "containerd-shim-embed-v1: {}",
                embedshim_core::chain(&failure)
            );
            ExitCode::FAILURE
        }
    }
}

/// What is to be written to standard output.
fn answer(flags: &Flags) -> Result<Vec<u8>, Failure> {
    match flags.action {
        Action::Start => start::run(flags, &stdin()?).map(String::into_bytes),
        Action::Delete => delete::run(flags),
        Action::Info => info::run(&stdin()?),
        Action::Version => Ok(info::version().into_bytes()),
    }
}

#[cfg(fuzzing)]
pub(crate) fn understands(arguments: impl Iterator<Item = OsString>, stdin: &[u8]) -> bool {
    Flags::parse(arguments).is_ok_and(|flags| match flags.action {
        Action::Info => info::options_of(stdin).is_ok(),
        _ => start::parameters(&flags, stdin).is_some(),
    })
}

fn stdin() -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    io::stdin().lock().take(MAX_STDIN).read_to_end(&mut bytes)?;
    Ok(bytes)
}

//! Exit codes: what a script can tell from how `embedshimd` ends. `--help` documents them.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Context;

/// How the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    /// All is well.
    Ok = 0,
    /// Something failed; the message says what.
    Failed = 1,
    /// The configuration is not valid. (2 is clap's, for a wrong command line.)
    Config = 3,
    /// No exit monitor can run on this kernel with these rights.
    Unsupported = 4,
    /// Another daemon works on this state directory.
    AlreadyRunning = 6,
    /// It runs, but an exit can be lost while the daemon is down.
    Partly = 7,
    /// The daemon serves, and something needs attention.
    Attention = 8,
    /// No daemon answers, or the one that was followed has ended.
    NoDaemon = 9,
}

impl Code {
    /// The code of another `embedshimd` process that has exited with this number.
    pub(crate) fn from_number(number: i32) -> Self {
        let known = [
            Self::Ok,
            Self::Config,
            Self::Unsupported,
            Self::AlreadyRunning,
            Self::Partly,
            Self::Attention,
            Self::NoDaemon,
        ];
        known
            .into_iter()
            .find(|code| *code as i32 == number)
            .unwrap_or(Self::Failed)
    }
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code as u8)
    }
}

/// An end with an error, and its exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: Code,
    pub(crate) error: anyhow::Error,
}

impl Failure {
    pub(crate) fn new(code: Code, error: impl Into<anyhow::Error>) -> Self {
        Self {
            code,
            error: error.into(),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::new(Code::Failed, error)
    }
}

/// Prints a line. A reader that has closed its end, as in `| head`, is no failure.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    print_while_read(text).map(drop)
}

/// Prints a line; false if the reader has closed its end.
pub(crate) fn print_while_read(text: &str) -> anyhow::Result<bool> {
    let mut stdout = io::stdout().lock();
    let printed = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
    match printed {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        printed => Ok(printed.context("cannot write to stdout").map(|()| true)?),
    }
}

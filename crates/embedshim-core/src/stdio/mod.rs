//! Standard streams of container processes: handed over whole where possible, copied only for terminals.
//! Owns who may hold which end of a fifo and for how long; never interprets what flows through.
//!
//! A client names fifos that it made and whose other ends it holds. The container gets the fifo itself, so there is no
//! copier and nothing to lose when the daemon is gone. Three rules follow (`containerd.md` 11.29-31):
//! - the client waits for EOF before it deletes, so no end of ours that can write to an output outlives the start;
//! - a client may go away and come back, so an end of ours that can *read* each output stays open, or the container
//!   would get EPIPE and unread output would be thrown away with the last opener;
//! - input ends when the client says so (`CloseIO`), not when it disconnects, so we hold a writer until then.

mod console;
mod copy;
mod held;
mod logger;
mod plan;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub(crate) use console::{Console, ConsoleSocket};
pub(crate) use held::{ChildStdio, HeldStdio};
pub(crate) use logger::{LoggedProcess, LoggerPipes, end_logger};
pub(crate) use plan::Plan;

/// The standard streams as a request names them: paths or URIs, empty for none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StdioPaths {
    /// A fifo, or empty.
    pub stdin: String,
    /// A fifo, `file://`, or empty.
    pub stdout: String,
    /// Likewise; unused with a terminal.
    pub stderr: String,
    /// The process gets a terminal.
    pub terminal: bool,
}

/// Why standard streams could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StdioError {
    /// A scheme that no shim knows. The text is runc-v2's.
    #[error("unknown STDIO scheme {scheme}")]
    UnknownScheme {
        /// Which.
        scheme: String,
    },
    /// A logger that could not be started.
    #[error("logger {program} {why}", program = .program.display())]
    Logger {
        /// The program that the request named.
        program: PathBuf,
        /// What was wrong.
        why: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A path that is neither a fifo nor a regular file, or not absolute.
    #[error("{stream} {path} is {what}; a fifo, a regular file, file:// or binary:// is needed", path = .path.display())]
    WrongKind {
        /// `stdin`, `stdout` or `stderr`.
        stream: &'static str,
        /// What the request named.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// A path that cannot be opened.
    #[error("cannot open {stream} {path}", path = .path.display())]
    Open {
        /// `stdin`, `stdout` or `stderr`.
        stream: &'static str,
        /// What the request named.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The runtime did not hand over a terminal.
    #[error("the OCI runtime handed over no terminal within {} s", .0.as_secs())]
    NoConsole(Duration),
    /// The terminal or its socket.
    #[error("cannot {doing}")]
    Console {
        /// What was tried.
        doing: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl StdioError {
    /// The request itself is wrong, whatever the state of the system.
    pub(crate) fn is_request_fault(&self) -> bool {
        matches!(self, Self::UnknownScheme { .. } | Self::WrongKind { .. })
    }
}

/// What the daemon holds of a process's standard streams while it lives.
#[derive(Debug)]
pub(crate) enum Streams {
    /// The container has the streams themselves; we keep the far ends.
    Held(HeldStdio),
    /// The container has a terminal; we copy.
    Terminal(Console),
}

impl Streams {
    /// Gives up our writer to the process's input: it reads EOF once the client's writers are gone too. Idempotent.
    pub(crate) fn close_stdin(&self) {
        match self {
            Self::Held(held) => held.close_stdin(),
            Self::Terminal(console) => console.close_stdin(),
        }
    }

    /// Whether its input ends with what is in it already: its client has been there, and has gone.
    pub(crate) fn client_has_gone(&self) -> bool {
        match self {
            Self::Held(held) => held.client_has_gone(),
            Self::Terminal(_) => false,
        }
    }

    /// The process may read from now on. Returns false if its input ends with its client.
    pub(crate) fn hold_stdin(&self) -> bool {
        match self {
            Self::Held(held) => held.hold_stdin(),
            Self::Terminal(_) => true,
        }
    }

    /// The process has ended: every end that could keep the client waiting for EOF is given up.
    pub(crate) fn end_of_process(&self) {
        match self {
            Self::Held(held) => held.close_stdin(),
            Self::Terminal(console) => console.end_of_process(),
        }
    }

    /// Waits until all output is with the client, for at most `limit`.
    pub(crate) async fn drained(&self, limit: Duration) {
        if let Self::Terminal(console) = self {
            console.drained(limit).await;
        }
    }

    /// Sets the size of the terminal, in characters; without a terminal there is nothing to do.
    pub(crate) fn resize(&self, width: u16, height: u16) -> Result<(), StdioError> {
        match self {
            Self::Held(_) => Ok(()),
            Self::Terminal(console) => console.resize(width, height),
        }
    }
}

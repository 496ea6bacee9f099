//! Standard streams of container processes: pipes or a terminal for the process, its client's fifos
//! and files on the other side, and the bytes that are moved between the two. Never interprets what
//! flows.
//!
//! Both ends of each stream are in the process's [`ProcessFds`](crate::fdstore) from before the
//! first call of the runtime until the process is over and all is moved, and bytes are moved by the
//! kernel from one to the other: at no instant is there anything in this daemon's memory alone
//! (invariant 13). So four rules hold whichever process is killed:
//! - the client reads no end before the process's output is over, and then at once: it waits for
//!   that before it deletes (invariant 9);
//! - what a client does not read stays in the pipes, and makes the process wait: never `EPIPE`,
//!   nothing lost;
//! - input ends when the client says so (`CloseIO`), not when it disconnects;
//! - nothing is moved before the runtime has succeeded: until then what is in the pipes are its own
//!   words.

mod append;
mod console;
mod ends;
mod flow;
mod flow_state;
mod idle;
mod logger;
mod non_blocking;
mod open;
mod pipe_size;
mod plan;
mod prepare;
mod pump;
mod ready;
mod run;
mod splice;
mod taken;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub(crate) use console::{ConsoleSocket, remove_abandoned};
pub(crate) use ends::{Streams, decide_input};
pub(crate) use idle::Idle;
pub(crate) use logger::{LoggedProcess, LoggerPipes, READY, end_logger};
pub(crate) use plan::Plan;
pub(crate) use prepare::{
    ChildStdio, Of, PipeInodes, adopt_client_ends, are_kept, discard_pipes, find_again,
    has_terminal, pipe_inodes, prepare, prepare_terminal,
};

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
    /// No stream can be waited for.
    #[error("cannot wait for streams")]
    Wait {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No pipe for the process.
    #[error("cannot make a pipe for the process")]
    Pipe {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// They would be lost with this program, and the process with them.
    #[error("cannot store the streams for the next daemon")]
    NotStored {
        /// Why not.
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

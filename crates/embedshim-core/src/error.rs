//! [`Error`]: what can go wrong with a task, in the words that containerd's clients match on.
//! Owns the texts of the operations; a face such as `shim-api` maps [`Error::kind`] to its codes.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::exit::WatchError;
use crate::id::InvalidId;

/// What class of failure it is, for the choice of a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// The task, process or cgroup does not exist (any more).
    NotFound,
    /// The id is taken.
    AlreadyExists,
    /// The request does not fit the state.
    FailedPrecondition,
    /// The request itself is wrong.
    InvalidArgument,
    /// We do not do this (yet).
    Unimplemented,
    /// A limit of embedshim is reached.
    ResourceExhausted,
    /// It took too long.
    DeadlineExceeded,
    /// Everything else; what a plain Go error would be.
    #[serde(other)]
    Other,
}

/// An error with its causes, each once: some errors say their cause themselves.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let told = cause.to_string();
        if !text.ends_with(&told) {
            text = format!("{text}: {told}");
        }
        next = cause.source();
    }
    text
}

/// What went wrong with a task. The texts are runc-v2's where it has one (`docs/shim-contract.md`,
/// "Task states").
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No such task.
    #[error("container not created")]
    NoSuchTask,
    /// No such exec process.
    #[error("process does not exist {id}")]
    NoSuchProcess {
        /// The exec id asked for.
        id: String,
    },
    /// A signal for a process that has ended.
    #[error("process already finished")]
    AlreadyFinished,
    /// A signal for a container that the runtime does not know any more.
    #[error("no such container")]
    NoSuchContainer,
    /// A signal for an exec that was not started.
    #[error("process not created")]
    NotStarted,
    /// The id of a task or exec is taken.
    #[error("id {id}")]
    IdTaken {
        /// The id.
        id: String,
    },
    /// The operation is not allowed in this state, in runc-v2's words.
    #[error("{0}")]
    WrongState(&'static str),
    /// An exec was to be started after the init's end.
    #[error("container {id} init process is not running")]
    InitNotRunning {
        /// The container.
        id: String,
    },
    /// The runtime was killed before it said whether it has started this exec, which is not found.
    #[error(
        "exec {id} may have run: the OCI runtime was killed before it reported; it is not started again"
    )]
    MayHaveRun {
        /// The exec.
        id: String,
    },
    /// A name is not an identifier.
    #[error(transparent)]
    InvalidId(#[from] InvalidId),
    /// The request is wrong in itself.
    #[error("{0}")]
    Invalid(String),
    /// We do not do this.
    #[error("{0}")]
    Unimplemented(String),
    /// The cgroup is gone or was never there.
    #[error("cgroup does not exist")]
    NoCgroup,
    /// The OCI runtime refused or failed.
    #[error("OCI runtime {operation} failed: {message}")]
    Runtime {
        /// `create`, `start`, `exec` ...
        operation: &'static str,
        /// The runtime's last error message.
        message: String,
    },
    /// The OCI runtime was killed: it may have done what it was called for.
    #[error("OCI runtime {operation} failed: {message}")]
    RuntimeKilled {
        /// `create`, `start`, `exec` ...
        operation: &'static str,
        /// How it ended.
        message: String,
    },
    /// CRIU could not write the checkpoint. The form is runc-v2's.
    #[error("{message} path= {log}", log = .log.display())]
    Checkpoint {
        /// The runtime's message.
        message: String,
        /// Where CRIU's log is.
        log: PathBuf,
    },
    /// A signal could not be delivered.
    #[error("unknown error after kill: {0}")]
    Kill(String),
    /// A file or directory of the state directory or of the bundle.
    #[error("{doing} {path}", path = .path.display())]
    Path {
        /// What was tried, such as "cannot read".
        doing: &'static str,
        /// With which path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Mounting or unmounting the root filesystem.
    #[error(transparent)]
    Rootfs(#[from] crate::rootfs::MountError),
    /// Opening or connecting standard streams.
    #[error(transparent)]
    Stdio(#[from] crate::stdio::StdioError),
    /// The exit monitor refused the process.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// A deadline that embedshim set has passed.
    #[error("{what} took longer than {seconds} s")]
    Deadline {
        /// What took so long.
        what: &'static str,
        /// The limit.
        seconds: u64,
    },
    /// What the same request was refused with before a restart, which its client was not told.
    #[error("{text}")]
    Refused {
        /// The class of that failure.
        kind: ErrorKind,
        /// Its text, with its causes.
        text: String,
    },
    /// A defect in embedshim, such as a panicked task.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    /// The class of this failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NoSuchTask
            | Self::NoSuchProcess { .. }
            | Self::AlreadyFinished
            | Self::NoSuchContainer
            | Self::NoCgroup => ErrorKind::NotFound,
            Self::IdTaken { .. } => ErrorKind::AlreadyExists,
            Self::NotStarted | Self::InitNotRunning { .. } => ErrorKind::FailedPrecondition,
            Self::InvalidId(_) | Self::Invalid(_) => ErrorKind::InvalidArgument,
            Self::Stdio(e) if e.is_request_fault() => ErrorKind::InvalidArgument,
            Self::Unimplemented(_) => ErrorKind::Unimplemented,
            Self::Watch(WatchError::TableFull { .. })
            | Self::Stdio(crate::stdio::StdioError::NotStored { .. }) => {
                ErrorKind::ResourceExhausted
            }
            Self::Deadline { .. } => ErrorKind::DeadlineExceeded,
            Self::Refused { kind, .. } => *kind,
            Self::WrongState(_)
            | Self::MayHaveRun { .. }
            | Self::Runtime { .. }
            | Self::RuntimeKilled { .. }
            | Self::Checkpoint { .. }
            | Self::Kill(_)
            | Self::Path { .. }
            | Self::Rootfs(_)
            | Self::Stdio(_)
            | Self::Watch(_)
            | Self::Internal(_) => ErrorKind::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    /// Says its cause itself, and tells it as well.
    #[derive(Debug, thiserror::Error)]
    #[error("level is wrong: {0}")]
    struct Talkative(#[source] io::Error);

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read the configuration")]
    struct Outer(#[source] Talkative);

    #[test]
    fn each_cause_is_reported_once() {
        let error = Outer(Talkative(io::Error::other("no such level")));
        assert_eq!(
            super::chain(&error),
            "cannot read the configuration: level is wrong: no such level"
        );
        // What `io::Error` was made of is not its cause, but itself.
        let wrapped = io::Error::other(error);
        assert_eq!(
            super::chain(&wrapped),
            "cannot read the configuration: level is wrong: no such level"
        );
    }
}

//! [`SandboxError`]: what can go wrong with a sandbox, by name.

use std::io;
use std::path::{Path, PathBuf};

use crate::error::ErrorKind;
use crate::id::SandboxKey;

/// What went wrong with a sandbox.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// No such sandbox.
    #[error("sandbox {0} does not exist")]
    Unknown(SandboxKey),
    /// The id is taken.
    #[error("sandbox {0} exists already")]
    IdTaken(SandboxKey),
    /// Another sandbox is the same pod's same attempt.
    #[error("sandbox {other} is ready and has the name {name:?}")]
    NameTaken {
        /// The pod's name, with its attempt.
        name: String,
        /// The sandbox that has it.
        other: SandboxKey,
    },
    /// The operation is not allowed in this state.
    #[error("sandbox {key} {state}")]
    WrongState {
        /// Which sandbox.
        key: SandboxKey,
        /// What it is.
        state: &'static str,
    },
    /// The request is wrong in itself.
    #[error("sandbox {key}: {why}")]
    Invalid {
        /// Which sandbox.
        key: SandboxKey,
        /// What is wrong.
        why: String,
    },
    /// More sandboxes were created and not started than one node can mean.
    #[error("{0} sandboxes are created and not started")]
    TooMany(usize),
    /// The configuration names a directory of containerd's that is not there.
    #[error(
        "sandbox.{setting} {path} is not the CRI's directory: neither it nor {neighbour} beside it is \
         there (docs/sandbox.md)",
        path = .path.display()
    )]
    NotTheCri {
        /// Which setting.
        setting: &'static str,
        /// Its value.
        path: PathBuf,
        /// What containerd would have beside it.
        neighbour: &'static str,
    },
    /// A step failed; what was done before it is undone.
    #[error("sandbox {key}: {doing} {path}", path = .path.display())]
    Step {
        /// Which sandbox.
        key: SandboxKey,
        /// What was tried, such as "cannot write".
        doing: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A deadline that embedshim set has passed.
    #[error("sandbox {key}: {what} takes longer than {seconds} s")]
    Deadline {
        /// Which sandbox.
        key: SandboxKey,
        /// What takes so long.
        what: &'static str,
        /// The limit.
        seconds: u64,
    },
    /// The directory of the records.
    #[error("{doing} {path}", path = .path.display())]
    Records {
        /// What was tried.
        doing: &'static str,
        /// With which path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A defect in embedshim, such as a panicked task.
    #[error("internal error: {0}")]
    Internal(String),
}

impl SandboxError {
    /// The class of this failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Unknown(_) => ErrorKind::NotFound,
            Self::IdTaken(_) | Self::NameTaken { .. } => ErrorKind::AlreadyExists,
            Self::WrongState { .. } | Self::NotTheCri { .. } => ErrorKind::FailedPrecondition,
            Self::Invalid { .. } => ErrorKind::InvalidArgument,
            Self::TooMany(_) => ErrorKind::ResourceExhausted,
            Self::Deadline { .. } => ErrorKind::DeadlineExceeded,
            Self::Step { .. } | Self::Records { .. } | Self::Internal(_) => ErrorKind::Other,
        }
    }
}

/// What a failed step of a sandbox becomes.
pub(super) fn failed<'a, E: Into<io::Error>>(
    key: &'a SandboxKey,
    doing: &'static str,
    path: &'a Path,
) -> impl FnOnce(E) -> SandboxError + 'a {
    move |source| SandboxError::Step {
        key: key.clone(),
        doing,
        path: path.to_owned(),
        source: source.into(),
    }
}

//! [`Failure`]: why the launcher failed, in the words that containerd passes on.

use std::io;
use std::path::PathBuf;

use embedshim_core::id::InvalidId;
use embedshim_core::rootfs::MountError;

/// Why the launcher failed. containerd shows the text to its client.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("{0}")]
    Usage(String),
    #[error(transparent)]
    InvalidId(#[from] InvalidId),
    #[error("{doing} {path}", path = .path.display())]
    Path {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("embedshimd did not start: {0}")]
    Daemon(String),
    #[error("embedshimd refused: {0}")]
    Refused(String),
    #[error(transparent)]
    Rootfs(#[from] MountError),
    #[error("OCI runtime {binary}: {why}")]
    Runtime { binary: String, why: String },
    #[error("cannot read or write standard streams")]
    Streams(#[from] io::Error),
}

//! [`Failure`]: why a call of the OCI runtime did not succeed, in runc-v2's words. Owns which of
//! the runtime's own words count.

use std::io;
use std::path::Path;
use std::time::Duration;

use super::log::last_error;
use crate::error::Error;

/// Why a call did not succeed.
#[derive(Debug)]
pub(super) enum Failure {
    NotRun(io::Error),
    Late,
    Exited { code: Option<i32>, stderr: String },
}

impl Failure {
    /// The runtime was ended, by us or by another process: it may have done what it was called for.
    pub(super) fn is_killed(&self) -> bool {
        matches!(self, Self::Late | Self::Exited { code: None, .. })
    }

    /// The runtime's own last word: log.json first, then stderr, then its status.
    pub(super) async fn message(self, binary: &str, deadline: Duration, log: &Path) -> String {
        match self {
            Self::NotRun(source) => {
                let advice = match source.kind() {
                    io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => {
                        "; install it or correct BinaryName"
                    }
                    _ => "",
                };
                format!("cannot run the OCI runtime {binary:?}: {source}{advice}")
            }
            Self::Late => format!(
                "{binary} did not finish within {} s and was killed",
                deadline.as_secs()
            ),
            Self::Exited { code, stderr } => match last_error(log).await {
                Some(message) => message,
                None if !stderr.is_empty() => stderr,
                None => match code {
                    Some(code) => {
                        format!("{binary} exited with status {code} and left no message")
                    }
                    None => format!("{binary} was killed by a signal"),
                },
            },
        }
    }

    /// Why a signal was not sent.
    pub(super) async fn of_kill(self, binary: &str, deadline: Duration, log: &Path) -> Error {
        kill_error(&self.message(binary, deadline, log).await)
    }
}

/// runc-v2's classification of what `runc kill` says (`checkKillError`; containerd b437938d2,
/// 0a2129222).
fn kill_error(message: &str) -> Error {
    const FINISHED: [&str; 3] = [
        "os: process already finished",
        "container not running",
        "no such process",
    ];
    if FINISHED.iter().any(|text| message.contains(text)) {
        Error::AlreadyFinished
    } else if message.contains("does not exist") {
        Error::NoSuchContainer
    } else {
        Error::Kill(message.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kill_errors_are_classified_as_runc_v2_does() {
        assert!(matches!(
            kill_error("container not running"),
            Error::AlreadyFinished
        ));
        assert!(matches!(
            kill_error("container does not exist"),
            Error::NoSuchContainer
        ));
        assert_eq!(
            kill_error("eperm").to_string(),
            "unknown error after kill: eperm"
        );
    }
}

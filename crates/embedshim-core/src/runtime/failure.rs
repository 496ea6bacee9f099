//! [`Failure`]: why a call of the OCI runtime did not succeed, in runc-v2's words. Owns which of
//! the runtime's own words count.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

use super::log::last_error;
use crate::error::Error;

/// Why a call did not succeed.
#[derive(Debug)]
pub(super) enum Failure {
    NotRun(io::Error),
    Late,
    Exited {
        status: ExitStatus,
        /// `None` of a call whose standard error is the container's.
        stderr: Option<String>,
    },
}

impl Failure {
    /// The runtime was ended, by us or by another process: it may have done what it was called for.
    pub(super) fn is_killed(&self) -> bool {
        match self {
            Self::NotRun(_) => false,
            Self::Late => true,
            Self::Exited { status, .. } => status.code().is_none(),
        }
    }

    /// The runtime's own last word: that of log.json, else its status and stderr.
    pub(super) async fn message(
        self,
        operation: &str,
        binary: &str,
        deadline: Duration,
        log: &Path,
    ) -> String {
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
            Self::Exited { status, stderr } => match last_error(log).await {
                Some(message) => message,
                None => without_a_word(operation, binary, status, stderr, log).await,
            },
        }
    }

    /// Why a signal was not sent.
    pub(super) async fn of_kill(self, binary: &str, deadline: Duration, log: &Path) -> Error {
        kill_error(&self.message("kill", binary, deadline, log).await)
    }
}

/// The words of go-runc, to which runc-v2 adds that a new container has no log. Of other calls it
/// has one, that of the creation, where each call has its own here.
async fn without_a_word(
    operation: &str,
    binary: &str,
    status: ExitStatus,
    stderr: Option<String>,
    log: &Path,
) -> String {
    const OF_SIGNALS: i32 = 128;
    let signal = status.signal().map(|signal| OF_SIGNALS + signal);
    let number = status.code().or(signal).unwrap_or(-1);
    let mut message = format!("{binary} did not terminate successfully: exit status {number}");
    if let Some(stderr) = stderr {
        message = format!("{message}: {stderr}");
    }
    let is_new = matches!(operation, "create" | "restore");
    if is_new && !tokio::fs::try_exists(log).await.unwrap_or(false) {
        let log = log.display();
        message = format!(
            "unable to retrieve OCI runtime error (open {log}: no such file or directory): \
             {message}"
        );
    }
    message
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

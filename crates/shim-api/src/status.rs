//! Errors as ttrpc's codes and containerd's words. Owns the one mapping from the core's errors.

use embedshim_core::{Error, ErrorKind, chain};
use ttrpc::{Code, Status};

/// The status of this error. The text has its causes; and for a class of Go's package `errdefs` its
/// suffix, by which containerd and its clients recognise it.
pub fn of(error: &Error) -> Status {
    of_kind(error.kind(), &chain(error))
}

/// The status of a failure of this class.
pub(crate) fn of_kind(kind: ErrorKind, text: &str) -> Status {
    let (code, suffix) = match kind {
        ErrorKind::NotFound => (Code::NOT_FOUND, ": not found"),
        ErrorKind::AlreadyExists => (Code::ALREADY_EXISTS, ": already exists"),
        ErrorKind::FailedPrecondition => (Code::FAILED_PRECONDITION, ": failed precondition"),
        ErrorKind::InvalidArgument => (Code::INVALID_ARGUMENT, ": invalid argument"),
        ErrorKind::Unimplemented => (Code::UNIMPLEMENTED, ": not implemented"),
        ErrorKind::ResourceExhausted => (Code::RESOURCE_EXHAUSTED, ""),
        ErrorKind::DeadlineExceeded => (Code::DEADLINE_EXCEEDED, ""),
        // An error of Go without a class becomes this.
        _ => (Code::UNKNOWN, ""),
    };
    ttrpc::get_status(code, format!("{text}{suffix}"))
}

/// The status of this error, as [`of`] makes it, for `map_err`.
#[expect(
    clippy::needless_pass_by_value,
    reason = "the signature that `map_err` takes"
)]
pub(crate) fn from(error: Error) -> Status {
    of(&error)
}

/// The status of an argument that cannot be understood.
pub(crate) fn invalid(text: impl Into<String>) -> Status {
    ttrpc::get_status(Code::INVALID_ARGUMENT, text.into())
}

/// The status of something that a daemon noted before it died, and that cannot be read any more.
pub(crate) fn damaged(what: &str) -> Status {
    let text = format!("embedshimd was restarted, and its note of {what} was damaged");
    ttrpc::get_status(Code::DATA_LOSS, text)
}

/// The answer to a method that a service does not have, in the words of Go's server.
pub(crate) fn unknown_method(method: &str) -> Status {
    ttrpc::get_status(Code::UNIMPLEMENTED, format!("method {method}"))
}

/// The status of a fault of this daemon.
pub(crate) fn internal(text: impl Into<String>) -> Status {
    ttrpc::get_status(Code::INTERNAL, text.into())
}

#[cfg(test)]
mod tests {
    use std::io;

    use embedshim_core::exit::WatchError;
    use embedshim_core::id::ContainerId;
    use embedshim_core::rootfs::MountError;
    use embedshim_core::stdio::StdioError;

    use super::*;

    #[test]
    fn every_error_has_its_code_and_containerds_words() {
        let denied = || io::Error::from(io::ErrorKind::PermissionDenied);
        let errors = [
            Error::NoSuchTask,
            Error::NoSuchProcess { id: "e".into() },
            Error::AlreadyFinished,
            Error::NoSuchContainer,
            Error::NotStarted,
            Error::IdTaken { id: "c".into() },
            Error::WrongState("cannot delete a running process"),
            Error::InitNotRunning { id: "c".into() },
            "../x".parse::<ContainerId>().unwrap_err().into(),
            Error::Invalid("bundle x is not an absolute path".into()),
            Error::Unimplemented("checkpoint is not supported yet".into()),
            Error::NoCgroup,
            Error::Runtime {
                operation: "create",
                message: "executable file not found in $PATH".into(),
            },
            Error::Kill("permission denied".into()),
            Error::Path {
                doing: "cannot open the bundle",
                path: "/b".into(),
                source: denied(),
            },
            Error::Rootfs(MountError::Unmount {
                target: "/b/rootfs".into(),
                source: denied(),
            }),
            Error::Stdio(StdioError::UnknownScheme { scheme: "x".into() }),
            Error::Stdio(StdioError::Open {
                stream: "stdout",
                path: "/o".into(),
                source: denied(),
            }),
            Error::Watch(WatchError::TableFull { capacity: 2 }),
            Error::Deadline {
                what: "the end of a killed init",
                seconds: 10,
            },
            Error::Internal("task 3 panicked".into()),
        ];
        let lines = errors.map(|error| {
            let status = of(&error);
            format!("{:?}: {}", status.code(), status.message)
        });
        insta::assert_snapshot!(lines.join("\n"));
    }
}

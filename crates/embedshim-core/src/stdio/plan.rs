//! [`Plan`]: what a request's paths and URIs mean. Pure: nothing is opened here.

use std::path::PathBuf;

use super::logger::Logger;
use super::{StdioError, StdioPaths};

/// What is to become of each stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(super) stdin: Option<PathBuf>,
    pub(super) stdout: Output,
    pub(super) stderr: Output,
    terminal: bool,
}

/// Where output goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Output {
    Null,
    /// A path, whose file type decides: fifo or regular file.
    Path(PathBuf),
    /// `file://`: made if it is missing; stdout and stderr share it.
    File(PathBuf),
    /// `binary://`: a program reads it.
    Logger(Logger),
}

impl Plan {
    /// Reads the request. Only stdout's scheme counts, as for runc-v2; with `file://` stderr goes
    /// there too.
    pub(crate) fn parse(paths: &StdioPaths) -> Result<Self, StdioError> {
        let plain = |stream, text: &str| -> Result<Option<PathBuf>, StdioError> {
            let path = text.strip_prefix("fifo://").unwrap_or(text);
            match path {
                "" => Ok(None),
                _ if path.starts_with('/') => Ok(Some(path.into())),
                _ => Err(StdioError::WrongKind {
                    stream,
                    path: path.into(),
                    what: "not an absolute path",
                }),
            }
        };
        let output = |stream, text: &str| {
            plain(stream, text).map(|path| path.map_or(Output::Null, Output::Path))
        };
        let stdin = plain("stdin", &paths.stdin)?;
        let terminal = paths.terminal;
        let (stdout, stderr) = match scheme(&paths.stdout) {
            None | Some("fifo") => (
                output("stdout", &paths.stdout)?,
                output("stderr", &paths.stderr)?,
            ),
            Some("file") => {
                let path = paths.stdout.trim_start_matches("file://");
                if !path.starts_with('/') {
                    return Err(StdioError::WrongKind {
                        stream: "stdout",
                        path: path.into(),
                        what: "not an absolute path",
                    });
                }
                (Output::File(path.into()), Output::File(path.into()))
            }
            Some(scheme @ ("binary" | "binary-v2")) => {
                let rest = paths.stdout.get(scheme.len() + "://".len()..);
                let logger = Logger::parse(scheme, rest.unwrap_or_default())?;
                (Output::Logger(logger.clone()), Output::Logger(logger))
            }
            Some(scheme) => {
                return Err(StdioError::UnknownScheme {
                    scheme: scheme.into(),
                });
            }
        };
        Ok(Self {
            stdin,
            stdout,
            stderr,
            terminal,
        })
    }

    /// Whether the process gets a terminal.
    pub(crate) fn terminal(&self) -> bool {
        self.terminal
    }

    /// The logger that the output goes to, if it goes to one.
    pub(crate) fn logger(&self) -> Option<&Logger> {
        match &self.stdout {
            Output::Logger(logger) => Some(logger),
            _ => None,
        }
    }
}

fn scheme(text: &str) -> Option<&str> {
    text.split_once("://").map(|(scheme, _)| scheme)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(stdin: &str, stdout: &str, stderr: &str) -> Result<Plan, StdioError> {
        Plan::parse(&StdioPaths {
            stdin: stdin.into(),
            stdout: stdout.into(),
            stderr: stderr.into(),
            terminal: false,
        })
    }

    #[test]
    fn stdouts_scheme_decides_for_both() {
        let plan = parse("", "file:///l", "/ignored").unwrap();
        assert_eq!(
            (plan.stdout, plan.stderr),
            (Output::File("/l".into()), Output::File("/l".into()))
        );
        let plan = parse("/i", "fifo:///o", "").unwrap();
        assert_eq!(
            (plan.stdin, plan.stdout, plan.stderr),
            (Some("/i".into()), Output::Path("/o".into()), Output::Null)
        );
    }

    #[test]
    fn what_cannot_be_is_refused_in_words() {
        let refused = |stdout: &str| parse("", stdout, "").unwrap_err().to_string();
        insta::assert_snapshot!(
            ["binary://logger?a=b", "http://x", "relative", "file://relative"].map(refused).join("\n"),
            @r"
        stdout logger is not the absolute path of a logger; a fifo, a regular file, file:// or binary:// is needed
        unknown STDIO scheme http
        stdout relative is not an absolute path; a fifo, a regular file, file:// or binary:// is needed
        stdout relative is not an absolute path; a fifo, a regular file, file:// or binary:// is needed
        "
        );
    }
}

//! What a request's paths and URIs mean. Pure but for [`Plan::open`], which opens them without ever waiting for a peer.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::held::{ChildStdio, HeldStdio, Input};
use super::logger::{LoggedProcess, Logger, LoggerPipes};
use super::{StdioError, StdioPaths};
use crate::descriptor::{Deposit, Role};
use crate::process::ProcessIdentity;

/// What is to become of each stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(super) stdin: Option<PathBuf>,
    pub(super) stdout: Output,
    pub(super) stderr: Output,
    terminal: bool,
}

/// The input of a terminal: a non-blocking reader, and the writer that keeps it open.
#[derive(Debug)]
pub(super) struct TerminalInput {
    pub(super) reader: File,
    pub(super) writer: OwnedFd,
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
    /// Reads the request. Only stdout's scheme counts, as for runc-v2; with `file://` stderr goes there too.
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

    /// Whether there is anything that could be opened again.
    pub(crate) fn has_paths(&self) -> bool {
        let is_path = |output: &Output| matches!(output, Output::Path(_));
        self.stdin.is_some() || is_path(&self.stdout) || is_path(&self.stderr)
    }

    /// Whether the process gets a terminal.
    pub(crate) fn terminal(&self) -> bool {
        self.terminal
    }

    /// Starts the logger, if the output goes to one, and waits until it is ready. Blocks.
    pub(crate) fn start_logger(
        &self,
        process: &LoggedProcess,
    ) -> Result<Option<(LoggerPipes, ProcessIdentity)>, StdioError> {
        match &self.stdout {
            Output::Logger(logger) => logger.start(process).map(Some),
            _ => Ok(None),
        }
    }

    /// Opens the streams of a process without a terminal: the ends for the process, and those we keep. `owner` is
    /// who the fifos are given to, so that a remapped root may reopen `/dev/stdout`. Blocks on the file system,
    /// never on a missing peer. `pipes` are the logger's, if there is one; what we keep is put into `deposit`.
    pub(crate) fn open(
        &self,
        owner: Option<(u32, u32)>,
        pipes: Option<LoggerPipes>,
        deposit: Deposit,
    ) -> Result<(ChildStdio, HeldStdio), StdioError> {
        let (logged_stdout, logged_stderr) =
            pipes.map(|pipes| (pipes.stdout, pipes.stderr)).unzip();
        let give = |stream, path: &Path, file: &File| match owner {
            None => Ok(()),
            Some((uid, gid)) => {
                fchown(file, Some(uid), Some(gid)).map_err(|source| StdioError::Open {
                    stream,
                    path: path.into(),
                    source,
                })
            }
        };
        let mut readers = Vec::new();
        let mut output =
            |role, stream, output: &Output, pipe: Option<OwnedFd>| -> Result<OwnedFd, StdioError> {
                match output {
                    Output::Null => null(stream),
                    Output::Logger(_) => {
                        let pipe = pipe.map_or_else(|| null(stream), Ok)?;
                        let pipe = File::from(pipe);
                        give(stream, Path::new("pipe"), &pipe)?;
                        Ok(pipe.into())
                    }
                    Output::File(path) => append(stream, path),
                    Output::Path(path) => match kind(stream, path)? {
                        Kind::File => {
                            Ok(existing(stream, path, OpenOptions::new().append(true), 0)?.into())
                        }
                        Kind::Fifo => {
                            readers.push((role, keep_reader(stream, path)?));
                            let file = open_fifo(stream, path, 0)?;
                            give(stream, path, &file)?;
                            Ok(file.into())
                        }
                    },
                }
            };
        let stdout = output(Role::Stdout, "stdout", &self.stdout, logged_stdout)?;
        let stderr = match (&self.stdout, &self.stderr) {
            (Output::File(one), Output::File(other)) if one == other => {
                stdout.try_clone().map_err(|source| StdioError::Open {
                    stream: "stderr",
                    path: other.into(),
                    source,
                })?
            }
            (_, stderr) => output(Role::Stderr, "stderr", stderr, logged_stderr)?,
        };
        let (stdin, input) = match &self.stdin {
            None => (null("stdin")?, Input::Closed),
            Some(path) => {
                let stdin = open_stdin(path)?;
                give("stdin", path, &stdin)?;
                let stdin = blocking(path, stdin)?;
                let reader = stdin.try_clone().map_err(|source| StdioError::Open {
                    stream: "stdin",
                    path: path.into(),
                    source,
                })?;
                (
                    stdin,
                    Input::Undecided {
                        reader,
                        path: path.into(),
                    },
                )
            }
        };
        Ok((
            ChildStdio {
                stdin,
                stdout,
                stderr,
            },
            HeldStdio::new(input, readers, deposit),
        ))
    }

    /// The input of a terminal, for our own reading.
    pub(super) fn open_input(&self) -> Result<Option<TerminalInput>, StdioError> {
        let open = |path| {
            Ok(TerminalInput {
                reader: open_stdin(path)?,
                writer: keep_writer(path)?,
            })
        };
        self.stdin.as_deref().map(open).transpose()
    }
}

fn scheme(text: &str) -> Option<&str> {
    text.split_once("://").map(|(scheme, _)| scheme)
}

pub(super) enum Kind {
    Fifo,
    File,
}

fn kind(stream: &'static str, path: &Path) -> Result<Kind, StdioError> {
    let failed = |source| StdioError::Open {
        stream,
        path: path.into(),
        source,
    };
    let kind = fs::symlink_metadata(path).map_err(failed)?.file_type();
    let wrong = |what| {
        Err(StdioError::WrongKind {
            stream,
            path: path.into(),
            what,
        })
    };
    match () {
        () if kind.is_fifo() => Ok(Kind::Fifo),
        () if kind.is_file() => Ok(Kind::File),
        () if kind.is_dir() => wrong("a directory"),
        () if kind.is_symlink() => wrong("a symbolic link"),
        () => wrong("a device or a socket"),
    }
}

/// The reading end of the input, non-blocking.
fn open_stdin(path: &Path) -> Result<File, StdioError> {
    if !matches!(kind("stdin", path)?, Kind::Fifo) {
        let what = "a regular file, which only outputs can be";
        return Err(StdioError::WrongKind {
            stream: "stdin",
            path: path.into(),
            what,
        });
    }
    existing(
        "stdin",
        path,
        OpenOptions::new().read(true),
        libc::O_NONBLOCK,
    )
}

/// Opened without blocking only so that opening did not wait; the process expects a blocking input.
fn blocking(path: &Path, reader: File) -> Result<OwnedFd, StdioError> {
    let flags = fcntl(&reader, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
    flags
        .and_then(|flags| fcntl(&reader, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK)))
        .map_err(|errno| StdioError::Open {
            stream: "stdin",
            path: path.into(),
            source: errno.into(),
        })?;
    Ok(reader.into())
}

/// A writer of the input fifo. Needs a reader to exist already.
pub(super) fn keep_writer(path: &Path) -> Result<OwnedFd, StdioError> {
    existing(
        "stdin",
        path,
        OpenOptions::new().write(true),
        libc::O_NONBLOCK,
    )
    .map(OwnedFd::from)
}

/// A reader of an output fifo that never reads: it keeps what is written, and the writer from EPIPE.
pub(super) fn keep_reader(stream: &'static str, path: &Path) -> Result<OwnedFd, StdioError> {
    existing(
        stream,
        path,
        OpenOptions::new().read(true),
        libc::O_NONBLOCK,
    )
    .map(OwnedFd::from)
}

/// Read-write: its writer never gets EPIPE, whoever else comes and goes, and opening waits for nobody.
fn open_fifo(stream: &'static str, path: &Path, flags: i32) -> Result<File, StdioError> {
    existing(
        stream,
        path,
        OpenOptions::new().read(true).write(true),
        flags,
    )
}

/// The output of a terminal, for our own writing.
pub(super) fn open_output(path: &Path) -> Result<(File, Kind), StdioError> {
    match kind("stdout", path)? {
        Kind::Fifo => Ok((open_fifo("stdout", path, libc::O_NONBLOCK)?, Kind::Fifo)),
        Kind::File => Ok((
            existing("stdout", path, OpenOptions::new().append(true), 0)?,
            Kind::File,
        )),
    }
}

/// Opens what [`kind`] has looked at; should it have become a symbolic link since, it is refused.
fn existing(
    stream: &'static str,
    path: &Path,
    options: &mut OpenOptions,
    flags: i32,
) -> Result<File, StdioError> {
    options
        .custom_flags(flags | libc::O_NOFOLLOW)
        .open(path)
        .map_err(|source| StdioError::Open {
            stream,
            path: path.into(),
            source,
        })
}

fn null(stream: &'static str) -> Result<OwnedFd, StdioError> {
    existing(
        stream,
        Path::new("/dev/null"),
        OpenOptions::new().read(true).write(true),
        0,
    )
    .map(OwnedFd::from)
}

/// A log file, made with its directories if it is missing, as runc-v2 does.
pub(super) fn append(stream: &'static str, path: &Path) -> Result<OwnedFd, StdioError> {
    let failed = |source: io::Error| StdioError::Open {
        stream,
        path: path.into(),
        source,
    };
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .map_err(failed)?;
    }
    // Non-blocking: should a fifo without a reader be there, opening fails instead of waiting.
    let mut options = OpenOptions::new();
    let file = options
        .append(true)
        .create(true)
        .mode(0o644)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    file.map(OwnedFd::from).map_err(failed)
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

//! Asks a running daemon for a document. Owns what is said when no daemon answers, and the bounds
//! of an answer; shows nothing.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use shim_api::bootstrap::location;

use super::http::{Stream, read_some};
use crate::state_dir::lock;

/// How long an answer may take, whose largest part is the reactor's second.
const LIMIT: Duration = Duration::from_secs(10);
/// How long a daemon may take to be replaced, during which its socket refuses.
const REPLACEMENT: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(20);
/// The longest answer: a thousand tasks have less than 1 MiB.
const MAX_ANSWER: usize = 64 << 20;
const MAX_HEADERS: usize = 16;
/// The longest head of an answer.
const MAX_HEAD: usize = 8 * 1024;
/// The longest line of an answer that does not end.
const MAX_LINE: u64 = 64 * 1024;

/// Why there is no document.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    /// Nothing works on the state directory.
    #[error(
        "no embedshimd runs on {state_dir}; containerd starts it with the first container, or \
         systemd does: systemctl status embedshimd.socket embedshimd",
        state_dir = .state_dir.display()
    )]
    NotRunning { state_dir: PathBuf },
    #[error("embedshimd on {state_dir} does not answer", state_dir = .state_dir.display())]
    NoAnswer {
        state_dir: PathBuf,
        #[source]
        source: io::Error,
    },
    /// There is no such thing.
    #[error("{what}")]
    NotFound { what: String },
    #[error("embedshimd refuses: {status} {what}")]
    Refused { status: u16, what: String },
    /// It was told events, and the connection has ended.
    #[error("embedshimd on {state_dir} has ended", state_dir = .state_dir.display())]
    Ended { state_dir: PathBuf },
    #[error("the answer cannot be read; the daemon may be of another version")]
    NotUnderstood(#[source] serde_json::Error),
}

/// The document at this path.
pub(crate) fn ask<T: DeserializeOwned>(state_dir: &Path, path: &str) -> Result<T, AskError> {
    let body = fetch(state_dir, path)?;
    serde_json::from_slice(&body).map_err(AskError::NotUnderstood)
}

/// The bytes of the answer to a request for this path.
pub(crate) fn fetch(state_dir: &Path, path: &str) -> Result<Vec<u8>, AskError> {
    let no_answer = |source| AskError::NoAnswer {
        state_dir: state_dir.to_owned(),
        source,
    };
    let stream = connect(state_dir)?;
    let (status, body) = converse(stream, path).map_err(no_answer)?;
    let what = || String::from_utf8_lossy(&body).trim().to_owned();
    match status {
        200 => Ok(body),
        404 => Err(AskError::NotFound { what: what() }),
        status => Err(AskError::Refused {
            status,
            what: what(),
        }),
    }
}

/// An answer that does not end: a line for each thing that happens.
#[derive(Debug)]
pub(crate) struct Lines {
    state_dir: PathBuf,
    lines: BufReader<UnixStream>,
}

impl Lines {
    /// The daemon has begun to answer when this returns.
    pub(crate) fn open(state_dir: &Path, path: &str) -> Result<Self, AskError> {
        let mut stream = connect(state_dir)?;
        let begun = begin_lines(&mut stream, path).map_err(|source| AskError::NoAnswer {
            state_dir: state_dir.to_owned(),
            source,
        })?;
        match begun {
            None => Ok(Self {
                state_dir: state_dir.to_owned(),
                lines: BufReader::new(stream),
            }),
            Some((status, what)) => Err(AskError::Refused { status, what }),
        }
    }

    /// Waits for the next line. With the daemon it ends, also in the middle of a line.
    pub(crate) fn next(&mut self) -> Result<String, AskError> {
        let mut line = String::new();
        let read = (&mut self.lines).take(MAX_LINE).read_line(&mut line);
        if read.is_err() || !line.ends_with('\n') {
            let state_dir = self.state_dir.clone();
            return Err(AskError::Ended { state_dir });
        }
        Ok(line)
    }
}

/// Sends the request for lines, and reads the head of the answer, which comes at once; returns what
/// the daemon says if it refuses.
fn begin_lines(stream: &mut UnixStream, path: &str) -> io::Result<Option<(u16, String)>> {
    stream.set_limits(Some(LIMIT))?;
    send_request(stream, path)?;
    let mut head = Vec::new();
    // No byte of the lines is read here.
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.extend_from_slice(&byte);
        if head.len() > MAX_HEAD {
            return Err(io::Error::other("the head of the answer is too long"));
        }
    }
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    response.parse(&head).map_err(io::Error::other)?;
    match response.code {
        Some(200) => {
            stream.set_limits(None)?;
            Ok(None)
        }
        code => {
            let mut said = String::new();
            stream.take(MAX_LINE).read_to_string(&mut said)?;
            Ok(Some((code.unwrap_or(0), said.trim().to_owned())))
        }
    }
}

fn send_request(stream: &mut UnixStream, path: &str) -> io::Result<()> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: embedshimd\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())
}

/// Connects to the daemon, also to one that is just being replaced.
fn connect(state_dir: &Path) -> Result<UnixStream, AskError> {
    let no_answer = |source| AskError::NoAnswer {
        state_dir: state_dir.to_owned(),
        source,
    };
    let path = location::admin_socket(state_dir).map_err(no_answer)?;
    let deadline = Instant::now() + REPLACEMENT;
    loop {
        let error = match UnixStream::connect(&path) {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        let is_absent = matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
        );
        if !is_absent {
            return Err(no_answer(error));
        }
        if !is_kept(state_dir) {
            return Err(AskError::NotRunning {
                state_dir: state_dir.to_owned(),
            });
        }
        if Instant::now() >= deadline {
            return Err(no_answer(error));
        }
        std::thread::sleep(PAUSE);
    }
}

/// Whether a daemon or a keeper works on the state directory.
fn is_kept(state_dir: &Path) -> bool {
    let paths = [lock::daemon_path(state_dir), lock::keeper_path(state_dir)];
    let mut owners = paths.iter().map(|path| lock::read_owner(path));
    owners.any(|owner| matches!(owner, Ok(Some(_))))
}

/// Sends the request, and reads status and body of the answer.
fn converse(mut stream: UnixStream, path: &str) -> io::Result<(u16, Vec<u8>)> {
    let deadline = Instant::now() + LIMIT;
    stream.set_limits(Some(LIMIT))?;
    send_request(&mut stream, path)?;
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let count = read_some(&mut stream, &mut buffer, deadline)?;
        bytes.extend_from_slice(buffer.get(..count).unwrap_or_default());
        if count == 0 {
            break;
        }
        if bytes.len() > MAX_ANSWER {
            return Err(io::Error::other("the answer is longer than 64 MiB"));
        }
    }
    parse(bytes)
}

/// Status and body of a whole answer.
fn parse(mut bytes: Vec<u8>) -> io::Result<(u16, Vec<u8>)> {
    let incomplete = || io::Error::from(io::ErrorKind::UnexpectedEof);
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let parsed = response.parse(&bytes).map_err(io::Error::other)?;
    let httparse::Status::Complete(head) = parsed else {
        return Err(incomplete());
    };
    let status = response.code.ok_or_else(incomplete)?;
    let length = response
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        .and_then(|header| {
            std::str::from_utf8(header.value)
                .ok()?
                .parse::<usize>()
                .ok()
        });
    let body = bytes.split_off(head);
    if length != Some(body.len()) {
        return Err(incomplete());
    }
    Ok((status, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_or_an_error() {
        let whole = b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnone";
        assert_eq!(parse(whole.to_vec()).unwrap(), (404, b"none".to_vec()));
        for end in 0..whole.len() {
            assert!(parse(whole[..end].to_vec()).is_err(), "{end}");
        }
        assert!(parse(b"SSH-2.0-x\r\n".to_vec()).is_err());
    }

    #[test]
    fn a_state_directory_on_which_nothing_works_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let error = fetch(directory.path(), "/v1/status").unwrap_err();
        assert!(matches!(error, AskError::NotRunning { .. }), "{error:?}");
        let lock = lock::take(directory.path(), &lock::keeper_path(directory.path()));
        let error = fetch(directory.path(), "/v1/status").unwrap_err();
        assert!(matches!(error, AskError::NoAnswer { .. }), "{error:?}");
        drop(lock);
    }
}

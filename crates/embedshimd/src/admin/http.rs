//! One request and one answer of HTTP/1.1 on a connection that is closed afterwards. Owns the
//! bounds: of a request's head, and of the time for all of it. Knows no document.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The longest head of a request: a path and the few headers that a scraper sends.
const MAX_HEAD: usize = 8 * 1024;
/// The most headers.
const MAX_HEADERS: usize = 64;

/// A connection whose reads and writes can be bounded in time.
pub(crate) trait Stream: Read + Write + AsFd {
    /// `None` is no bound.
    fn set_limits(&self, limit: Option<Duration>) -> io::Result<()>;
}

impl Stream for UnixStream {
    fn set_limits(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(limit)?;
        self.set_write_timeout(limit)
    }
}

impl Stream for TcpStream {
    fn set_limits(&self, limit: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(limit)?;
        self.set_write_timeout(limit)
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) content_type: &'static str,
    pub(super) body: Vec<u8>,
}

impl Answer {
    /// An answer in a sentence.
    pub(super) fn text(status: u16, text: &str) -> Self {
        Self {
            status,
            content_type: "text/plain; charset=utf-8",
            body: format!("{text}\n").into_bytes(),
        }
    }
}

/// The path of a request, or the answer by which it is refused.
pub(super) fn read_path(
    stream: &mut impl Stream,
    deadline: Instant,
) -> io::Result<Result<String, Answer>> {
    let mut head = Vec::new();
    let mut buffer = [0; 1024];
    loop {
        let count = read_some(stream, &mut buffer, deadline)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        head.extend_from_slice(buffer.get(..count).unwrap_or_default());
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        match request.parse(&head) {
            Ok(status) if status.is_complete() => {
                let (Some(method), Some(path)) = (request.method, request.path) else {
                    return Ok(Err(Answer::text(400, "this is no request")));
                };
                if method != "GET" {
                    return Ok(Err(Answer::text(405, "only GET is answered")));
                }
                return Ok(Ok(path.to_owned()));
            }
            Ok(_) if head.len() < MAX_HEAD => {}
            Ok(_) => return Ok(Err(Answer::text(431, "the head is too long"))),
            Err(error) => {
                return Ok(Err(Answer::text(
                    400,
                    &format!("this is no request: {error}"),
                )));
            }
        }
    }
}

/// Reads what there is, before the deadline.
pub(super) fn read_some(
    stream: &mut impl Stream,
    buffer: &mut [u8],
    deadline: Instant,
) -> io::Result<usize> {
    loop {
        stream.set_limits(Some(left(deadline)?))?;
        match stream.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}

/// Writes all of an answer before the deadline.
pub(super) fn write(
    stream: &mut impl Stream,
    answer: &Answer,
    deadline: Instant,
) -> io::Result<()> {
    let reason = match answer.status {
        200 => "OK",
        404 => "Not Found",
        405 => "Method Not Allowed",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        _ => "Bad Request",
    };
    let head = format!(
        "HTTP/1.1 {} {reason}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: \
         close\r\n\r\n",
        answer.status,
        answer.content_type,
        answer.body.len()
    );
    for bytes in [head.as_bytes(), &answer.body] {
        write_bytes(stream, bytes, deadline)?;
    }
    Ok(())
}

/// Writes the head of an answer whose body ends with the connection.
pub(super) fn write_open_head(
    stream: &mut impl Stream,
    content_type: &str,
    deadline: Instant,
) -> io::Result<()> {
    let head =
        format!("HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nConnection: close\r\n\r\n");
    write_bytes(stream, head.as_bytes(), deadline)
}

/// Writes all of it by the deadline.
pub(crate) fn write_bytes(
    stream: &mut impl Stream,
    mut bytes: &[u8],
    deadline: Instant,
) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.set_limits(Some(left(deadline)?))?;
        match stream.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The time that is left, which is never zero: that would be no limit.
pub(crate) fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn serve(
        stream: &mut UnixStream,
        limit: Duration,
        route: impl FnOnce(&str) -> Answer,
    ) -> io::Result<()> {
        let answer = read_path(stream, Instant::now() + limit)?;
        let answer = answer.map_or_else(|refused| refused, |path| route(&path));
        write(stream, &answer, Instant::now() + limit)
    }

    fn converse(request: &[u8]) -> (String, io::Result<()>) {
        let (mut client, mut ours) = UnixStream::pair().unwrap();
        client.write_all(request).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let served = serve(&mut ours, Duration::from_secs(20), |path| {
            Answer::text(200, path)
        });
        drop(ours);
        let mut answer = String::new();
        // What the server has not read makes this end with a reset.
        let _ = client.read_to_string(&mut answer);
        (answer, served)
    }

    #[test]
    fn a_request_is_answered_by_its_path() {
        let (answer, served) = converse(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n");
        served.unwrap();
        insta::assert_snapshot!("answer", answer.replace("\r\n", "\n"));
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let mut long = b"GET / HTTP/1.1\r\n".to_vec();
        long.extend(std::iter::repeat_n(b"a: b\r\n", 2000).flatten());
        let cases: [(&[u8], &str); 4] = [
            (b"POST / HTTP/1.1\r\n\r\n", "HTTP/1.1 405 "),
            (b"\x16\x03\x01 hello\r\n\r\n", "HTTP/1.1 400 "),
            (b"GET /\0 HTTP/1.1\r\n\r\n", "HTTP/1.1 400 "),
            (&long, "HTTP/1.1 4"),
        ];
        for (request, expected) in cases {
            let (answer, _) = converse(request);
            assert!(answer.starts_with(expected), "{answer}");
        }
        let (answer, served) = converse(b"GET / HT");
        assert_eq!(answer, "");
        assert_eq!(served.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn whatever_is_wrong_in_a_request_it_is_answered_or_given_up() {
        let whole = b"GET /v1/tasks/ns/id?x=%00 HTTP/1.1\r\nHost: a\r\n\r\n";
        for at in 0..whole.len() {
            for byte in [0, b'\n', b' ', b'/', b':', 0x7f, 0xff] {
                let mut request = whole.to_vec();
                request[at] = byte;
                let (answer, outcome) = converse(&request);
                let is_answered = answer.starts_with("HTTP/1.1 ");
                assert!(is_answered || outcome.is_err(), "{request:?}: {answer}");
            }
            let (answer, outcome) = converse(&whole[..at]);
            assert!(answer.is_empty() && outcome.is_err(), "{at}: {answer}");
        }
    }

    #[test]
    fn a_client_that_sends_its_request_slowly_is_given_up() {
        let (mut client, mut ours) = UnixStream::pair().unwrap();
        let slow = thread::spawn(move || {
            for byte in std::iter::repeat(b'a') {
                if client.write_all(&[byte]).is_err() {
                    return;
                }
                thread::sleep(Duration::from_millis(10));
            }
        });
        let began = Instant::now();
        let limit = Duration::from_millis(200);
        let served = serve(&mut ours, limit, |_| Answer::text(200, ""));
        // Either kind is what a socket's own limit says.
        let kind = served.unwrap_err().kind();
        assert!(
            [io::ErrorKind::TimedOut, io::ErrorKind::WouldBlock].contains(&kind),
            "{kind}"
        );
        assert!(began.elapsed() < Duration::from_secs(20));
        drop(ours);
        slow.join().unwrap();
    }
}

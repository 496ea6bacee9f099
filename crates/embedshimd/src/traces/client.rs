//! [`Client`]: one HTTP/1.1 request by plain TCP, with a deadline. Owns the bytes of it; what is in
//! them is the exporter's. Blocks, so only the thread that sends spans may use it.
//!
//! A client of the crate's own would bring an HTTP stack and TLS into the daemon. A collector is on
//! the same node, or a proxy for a distant one is.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};

use crate::admin::http::{left, write_bytes};

/// The longest head of an answer.
const MAX_HEAD: usize = 16 * 1024;
/// The most headers of one.
const MAX_HEADERS: usize = 64;
/// The longest body that is read; what it says is of no use here.
const MAX_BODY: usize = 64 * 1024;
const PORT: u16 = 80;

/// A client that takes no longer than this for a request, but for the look-up of a name.
#[derive(Debug)]
pub(super) struct Client {
    limit: Duration,
    last_error: LastError,
}

/// Why the last request failed: the exporter that made it says no more than that it did.
#[derive(Clone, Debug, Default)]
pub(super) struct LastError(Arc<Mutex<Option<String>>>);

impl LastError {
    fn set(&self, error: &io::Error) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
    }

    /// Takes it, so that it is told once.
    pub(super) fn take(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// What an answer begins with.
struct Head {
    status: u16,
    /// How long to wait before the next attempt, in the server's words.
    retry_after: Option<Vec<u8>>,
    /// The bytes of its body that have not come yet.
    left: usize,
}

impl Client {
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            limit,
            last_error: LastError::default(),
        }
    }

    /// Where it says why a request has failed.
    pub(super) fn last_error(&self) -> LastError {
        self.last_error.clone()
    }

    fn send(&self, request: &Request<Bytes>) -> io::Result<Head> {
        let deadline = Instant::now() + self.limit;
        let mut stream = connect(request, deadline)?;
        let mut message = head(request)?;
        message.extend_from_slice(request.body());
        write_bytes(&mut stream, &message, deadline)?;
        let head = read_head(&mut stream, deadline)?;
        // Read to its end, so that closing the connection does not reset it. That is all a body is
        // good for.
        let _ = skip(&mut stream, head.left.min(MAX_BODY), deadline);
        Ok(head)
    }
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let sent = self.send(&request);
        let head = sent.inspect_err(|error| self.last_error.set(error))?;
        let mut response = Response::builder().status(head.status);
        if let Some(after) = head.retry_after {
            response = response.header("retry-after", after);
        }
        Ok(response.body(Bytes::new())?)
    }
}

fn connect(request: &Request<Bytes>, deadline: Instant) -> io::Result<TcpStream> {
    let missing = || io::Error::new(io::ErrorKind::InvalidInput, "the endpoint names no host");
    let uri = request.uri();
    let host = uri.host().ok_or_else(missing)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let port = uri.port_u16().unwrap_or(PORT);
    let mut failure = missing();
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, left(deadline)?) {
            Ok(stream) => return Ok(stream),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// The bytes before the body.
fn head(request: &Request<Bytes>) -> io::Result<Vec<u8>> {
    let uri = request.uri();
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    let mut head = Vec::with_capacity(512 + request.body().len());
    write!(
        head,
        "{} {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\nContent-Length: {}\r\n",
        request.method(),
        request.body().len()
    )?;
    for (name, value) in request.headers() {
        head.extend_from_slice(name.as_str().as_bytes());
        head.extend_from_slice(b": ");
        head.extend_from_slice(value.as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    head.extend_from_slice(b"\r\n");
    Ok(head)
}

fn read(stream: &mut TcpStream, chunk: &mut [u8], deadline: Instant) -> io::Result<usize> {
    loop {
        stream.set_read_timeout(Some(left(deadline)?))?;
        match stream.read(chunk) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn read_head(stream: &mut TcpStream, deadline: Instant) -> io::Result<Head> {
    let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_owned());
    let mut bytes = Vec::new();
    let mut chunk = [0; 1024];
    while bytes.len() < MAX_HEAD {
        let count = read(stream, &mut chunk, deadline)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.extend_from_slice(chunk.get(..count).unwrap_or_default());
        if let Some(head) = parse(&bytes).map_err(|error| invalid(&error.to_string()))? {
            return Ok(head);
        }
    }
    Err(invalid("the head of the answer is too long"))
}

/// The head of an answer, once it is there as a whole.
fn parse(bytes: &[u8]) -> Result<Option<Head>, httparse::Error> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(end) = response.parse(bytes)? else {
        return Ok(None);
    };
    let value = |name: &str| {
        let mut named = response.headers.iter();
        let found = named.find(|header| header.name.eq_ignore_ascii_case(name));
        found.map(|header| header.value.to_vec())
    };
    let length = value("content-length").and_then(|text| String::from_utf8(text).ok());
    let length: usize = length
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0);
    Ok(Some(Head {
        status: response.code.unwrap_or(0),
        retry_after: value("retry-after"),
        left: length.saturating_sub(bytes.len().saturating_sub(end)),
    }))
}

fn skip(stream: &mut TcpStream, mut count: usize, deadline: Instant) -> io::Result<()> {
    let mut chunk = [0; 1024];
    while count > 0 {
        match read(stream, &mut chunk, deadline)? {
            0 => return Ok(()),
            skipped => count = count.saturating_sub(skipped),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    fn answered_with(answer: &'static [u8]) -> io::Result<Head> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("http://{}/v1/traces", listener.local_addr().unwrap());
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            let mut chunk = [0; 1024];
            while !request.ends_with(b"\r\n\r\nspans") {
                let count = stream.read(&mut chunk).unwrap();
                request.extend_from_slice(&chunk[..count]);
            }
            stream.write_all(answer).unwrap();
            String::from_utf8(request).unwrap()
        });
        let request = Request::post(uri).header("a", "b");
        let request = request.body(Bytes::from_static(b"spans")).unwrap();
        let head = Client::new(Duration::from_secs(5)).send(&request);
        let request = server.join().unwrap();
        assert!(
            request.starts_with("POST /v1/traces HTTP/1.1\r\n"),
            "{request}"
        );
        assert!(
            request.contains("\r\nContent-Length: 5\r\na: b\r\n"),
            "{request}"
        );
        head
    }

    #[test]
    fn an_answer_is_its_status_and_when_to_come_again() {
        let head =
            answered_with(b"HTTP/1.1 503 No\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\nno");
        let head = head.unwrap();
        assert_eq!((head.status, head.retry_after), (503, Some(b"7".to_vec())));
        assert_eq!(answered_with(b"HTTP/1.0 200\r\n\r\n").unwrap().status, 200);
    }

    #[test]
    fn what_is_no_answer_is_an_error() {
        for answer in [
            b"".as_slice(),
            b"HTTP/1.1 200",
            b"SSH-2.0\r\n\r\n",
            &[b'x'; MAX_HEAD],
        ] {
            assert!(answered_with(answer).is_err());
        }
    }

    #[test]
    fn a_server_that_does_not_answer_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("http://{}/", listener.local_addr().unwrap());
        let request = Request::post(uri).body(Bytes::new()).unwrap();
        let Err(error) = Client::new(Duration::from_millis(50)).send(&request) else {
            panic!("it has not answered");
        };
        let is_late = matches!(
            error.kind(),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
        );
        assert!(is_late, "{error}");
    }
}

//! One call to the daemon over a blocking socket. Owns nothing that lasts.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use protobuf::Message;
use ttrpc::{Code, Request, Response};

use crate::frame::{self, HEADER, Header, MAX_PAYLOAD};

/// Calls a method of one of the daemon's services, on a new connection; the outer error is the
/// connection's, the inner one the daemon's refusal.
pub(super) fn call(
    mut stream: UnixStream,
    service: &str,
    method: &str,
    payload: Vec<u8>,
    limit: Duration,
) -> io::Result<Result<Vec<u8>, String>> {
    let deadline = Instant::now() + limit;
    let request = Request {
        service: service.into(),
        method: method.into(),
        payload,
        ..Request::default()
    };
    let frame = frame::request(1, &request).ok_or(io::ErrorKind::InvalidInput)?;
    stream.set_write_timeout(Some(limit))?;
    stream.write_all(&frame)?;
    let mut header = [0; HEADER];
    read(&mut stream, &mut header, deadline)?;
    let length = Header::decode(header).length.min(MAX_PAYLOAD);
    let mut payload = vec![0; usize::try_from(length).unwrap_or_default()];
    read(&mut stream, &mut payload, deadline)?;
    let response = Response::parse_from_bytes(&payload)?;
    let status = response.status();
    Ok(if status.code() == Code::OK {
        Ok(response.payload)
    } else {
        Err(status.message.clone())
    })
}

/// Fills `bytes`, or fails at the deadline, however slowly the bytes come.
fn read(stream: &mut UnixStream, bytes: &mut [u8], deadline: Instant) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(rest) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => rest = rest.get_mut(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

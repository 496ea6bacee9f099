//! [`FrameReader`]: frames off a socket, whatever the pieces they come in, so that the death of
//! this process loses none of them. Owns the order of peeking, noting and consuming: bytes are
//! peeked, noted in the journal, and only then consumed (invariant 14).
//!
//! A frame that is there as a whole is one entry; that it was consumed is known from the number of
//! its stream, which only rises. A frame that is not there as a whole (it may be longer than the
//! socket's buffer) is consumed in parts. Whether the last part was consumed is remembered by the
//! socket itself: `SO_PEEK_OFF` moves on when bytes are peeked, and back when they are consumed
//! (Linux 3.4).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use embedshim_core::failpoint;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, getsockopt, recv, setsockopt};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::journal::{FrameStart, Journal, Partial, Recovered};
use super::peek_off::PeekOff;
use crate::frame::{HEADER, Header, Kind, MAX_PAYLOAD};

/// The most bytes that are peeked at a time; they are on the stack of a function that does not
/// wait, so an idle connection has no buffer.
const CHUNK: usize = 16 * 1024;

/// A frame that has arrived.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// A frame with its payload.
    Whole(Header, Vec<u8>),
    /// A frame that is longer than ttrpc allows: its payload was thrown away.
    Oversized(Header),
    /// A frame of which a part was damaged in the journal of a daemon that died.
    Damaged(Header),
}

impl Frame {
    pub(super) fn header(&self) -> Header {
        match self {
            Self::Whole(header, _) | Self::Oversized(header) | Self::Damaged(header) => *header,
        }
    }
}

/// The reader of one connection.
#[derive(Debug, Default)]
pub(super) struct FrameReader {
    /// What was consumed of a frame that has not arrived as a whole.
    partial: Partial,
}

/// What one look at the socket brought.
enum Look {
    /// A whole frame.
    Frame(Frame),
    /// Perhaps a part of one.
    Nothing,
    /// The client has closed the connection.
    End,
}

impl FrameReader {
    /// Goes on where another process was; an error if nothing tells where that is.
    pub(super) fn resume(stream: &UnixStream, recovered: &Recovered) -> io::Result<Self> {
        let reader = Self {
            partial: recovered.partial.clone(),
        };
        // What the last entry is about is noted, and may be in the socket still.
        if recovered.is_part_maybe_consumed {
            let left = getsockopt(stream, PeekOff).unwrap_or(0);
            consume(stream, usize::try_from(left).unwrap_or(0))?;
        }
        setsockopt(stream, PeekOff, &-1)?;
        if let Some(request) = recovered.maybe_consumed {
            consume_if_there(stream, request)?;
        }
        let is_lost = match recovered.framing {
            FrameStart::Known => false,
            FrameStart::Presumed => !looks_like_a_frame(stream)?,
            FrameStart::Lost => true,
        };
        if is_lost {
            let text = "its journal is damaged: where the next frame begins is not known";
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(reader)
    }

    /// The stream of the request that is next in the socket, if there is one.
    pub(super) fn next_request(&self, stream: &UnixStream) -> io::Result<Option<u32>> {
        if !self.partial.bytes.is_empty() {
            return Ok(None);
        }
        let header = next_header(stream)?.map(Header::decode);
        Ok(header.and_then(|header| (header.kind == Kind::Request).then_some(header.stream)))
    }

    /// The next frame; `None` if the client has closed the connection. Cancel-safe.
    pub(super) async fn next(
        &mut self,
        stream: &UnixStream,
        journal: &mut Journal,
    ) -> io::Result<Option<Frame>> {
        loop {
            if let Some(frame) = self.take_complete(journal) {
                return Ok(Some(frame));
            }
            stream.readable().await?;
            match stream.try_io(Interest::READABLE, || self.look(stream, journal)) {
                Ok(Look::Frame(frame)) => return Ok(Some(frame)),
                Ok(Look::Nothing) => {}
                Ok(Look::End) if self.partial.bytes.is_empty() => return Ok(None),
                Ok(Look::End) => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the client closed the connection within a frame",
                    ));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads what is there, at most one frame.
    fn look(&mut self, stream: &UnixStream, journal: &mut Journal) -> io::Result<Look> {
        let mut chunk = [0; CHUNK];
        // The usual case: a whole frame, which is one note.
        if self.partial.bytes.is_empty() {
            let count = peek(stream, &mut chunk)?;
            if count == 0 {
                return Ok(Look::End);
            }
            let seen = chunk.get(..count).unwrap_or_default();
            if let Some((header, payload)) = whole(seen) {
                let length = HEADER + payload.len();
                let frame = Frame::Whole(header, payload.to_vec());
                if header.kind == Kind::Request {
                    journal.request(header.stream, seen.get(..length).unwrap_or_default());
                }
                consume(stream, length)?;
                failpoint::step("after a request was consumed");
                return Ok(Look::Frame(frame));
            }
        }
        // A part of a frame: the socket counts how much of it is peeked and not consumed.
        let wanted = self.wanted().min(CHUNK);
        setsockopt(stream, PeekOff, &0)?;
        let count = peek(stream, chunk.get_mut(..wanted).unwrap_or_default())?;
        if count == 0 {
            return Ok(Look::End);
        }
        let seen = chunk.get(..count).unwrap_or_default();
        if self.is_oversized() {
            journal.skipped(count);
            self.partial.skipped += count;
        } else {
            journal.part(&self.partial.bytes, seen);
            // Memory grows with what arrives, not with what was announced.
            self.partial.bytes.extend_from_slice(seen);
        }
        consume(stream, count)?;
        journal.part_consumed();
        setsockopt(stream, PeekOff, &-1)?;
        Ok(Look::Nothing)
    }

    /// How many bytes are missing: of the header, or then of the frame.
    fn wanted(&self) -> usize {
        match self.header() {
            None => HEADER - self.partial.bytes.len().min(HEADER),
            Some(header) => length_of(header)
                .saturating_sub(self.partial.skipped)
                .saturating_sub(self.partial.bytes.len()),
        }
    }

    fn header(&self) -> Option<Header> {
        self.partial
            .bytes
            .first_chunk()
            .copied()
            .map(Header::decode)
    }

    fn is_oversized(&self) -> bool {
        self.header()
            .is_some_and(|header| header.length > MAX_PAYLOAD)
    }

    /// The frame that came in parts, once it is whole.
    fn take_complete(&mut self, journal: &mut Journal) -> Option<Frame> {
        let header = self.header()?;
        if self.partial.bytes.len() + self.partial.skipped < length_of(header) {
            return None;
        }
        let frame = std::mem::take(&mut self.partial);
        let is_whole = header.length <= MAX_PAYLOAD && !frame.is_damaged;
        match header.kind {
            Kind::Request if is_whole => journal.parts_are(header.stream, &frame.bytes),
            Kind::Request => journal.parts_are_lost(header.stream),
            _ => journal.parts_are_nothing(),
        }
        if header.length > MAX_PAYLOAD {
            return Some(Frame::Oversized(header));
        }
        if frame.is_damaged {
            return Some(Frame::Damaged(header));
        }
        let payload = frame.bytes.get(HEADER..).unwrap_or_default().to_vec();
        Some(Frame::Whole(header, payload))
    }
}

fn length_of(header: Header) -> usize {
    usize::try_from(header.length).map_or(usize::MAX, |length| length.saturating_add(HEADER))
}

/// The frame that these bytes begin with, if they hold all of it.
pub(super) fn whole(bytes: &[u8]) -> Option<(Header, &[u8])> {
    let header = bytes.first_chunk().copied().map(Header::decode)?;
    let end = length_of(header);
    let frame = bytes.get(..end).filter(|_| header.length <= MAX_PAYLOAD)?;
    Some((header, frame.get(HEADER..)?))
}

/// Consumes the request that was noted last, if it is in the socket still. This comes before
/// anything else is noted: a successor that finds an entry behind it takes it for consumed.
fn consume_if_there(stream: &UnixStream, request: u32) -> io::Result<()> {
    let mut chunk = [0; CHUNK];
    let count = match peek(stream, &mut chunk) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
        peeked => peeked?,
    };
    match whole(chunk.get(..count).unwrap_or_default()) {
        Some((header, payload)) if header.stream == request => {
            consume(stream, HEADER + payload.len())
        }
        _ => Ok(()),
    }
}

/// Whether what is next in the socket can be the beginning of a frame.
fn looks_like_a_frame(stream: &UnixStream) -> io::Result<bool> {
    let header = next_header(stream)?.map(Header::decode);
    Ok(header.is_none_or(|header| {
        header.kind == Kind::Request && header.stream % 2 == 1 && header.length <= MAX_PAYLOAD
    }))
}

/// The next bytes in the socket, if they are enough for a header.
fn next_header(stream: &UnixStream) -> io::Result<Option<[u8; HEADER]>> {
    let mut header = [0; HEADER];
    match peek(stream, &mut header) {
        Ok(HEADER) => Ok(Some(header)),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

fn peek(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
    receive(stream, buffer, MsgFlags::MSG_PEEK)
}

/// Consumes bytes that were peeked; they are there, so this does not wait.
fn consume(stream: &UnixStream, mut count: usize) -> io::Result<()> {
    let mut chunk = [0; CHUNK];
    while count > 0 {
        let wanted = chunk.get_mut(..count.min(CHUNK)).unwrap_or_default();
        let taken = receive(stream, wanted, MsgFlags::empty())?;
        if taken == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        count -= taken;
    }
    Ok(())
}

fn receive(stream: &UnixStream, buffer: &mut [u8], flags: MsgFlags) -> io::Result<usize> {
    loop {
        let flags = flags | MsgFlags::MSG_DONTWAIT;
        match recv(stream.as_fd().as_raw_fd(), buffer, flags) {
            Ok(count) => return Ok(count),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

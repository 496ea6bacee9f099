//! [`FrameReader`]: frames off a socket, whatever the pieces they come in. Owns the half-read frame, so that waiting for the
//! next frame can be given up and taken up again at any moment.

use std::io;

use tokio::net::unix::OwnedReadHalf;

use crate::frame::{HEADER, Header, MAX_PAYLOAD};

/// Bytes per read; on the stack of a call that does not wait, so an idle connection holds no buffer.
const CHUNK: usize = 16 * 1024;

/// A frame that has arrived.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// With its payload.
    Whole(Header, Vec<u8>),
    /// Longer than ttrpc allows: its payload was thrown away.
    Oversized(Header),
}

#[derive(Debug)]
pub(super) struct FrameReader {
    stream: OwnedReadHalf,
    header: [u8; HEADER],
    header_filled: usize,
    payload: Vec<u8>,
    /// Bytes of an oversized payload seen so far.
    discarded: usize,
}

impl FrameReader {
    pub(super) fn new(stream: OwnedReadHalf) -> Self {
        Self {
            stream,
            header: [0; HEADER],
            header_filled: 0,
            payload: Vec::new(),
            discarded: 0,
        }
    }

    /// The next frame; `None` at the end of the stream. Cancel-safe.
    pub(super) async fn next(&mut self) -> io::Result<Option<Frame>> {
        loop {
            if let Some(frame) = self.take_complete() {
                return Ok(Some(frame));
            }
            self.stream.readable().await?;
            match self.read_some() {
                Ok(0) if self.header_filled == 0 => return Ok(None),
                Ok(0) => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the peer left within a frame",
                    ));
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The length that the header announces, once it is here.
    fn announced(&self) -> Option<(Header, usize)> {
        let header = (self.header_filled == HEADER).then(|| Header::decode(self.header))?;
        Some((header, usize::try_from(header.length).unwrap_or(usize::MAX)))
    }

    fn take_complete(&mut self) -> Option<Frame> {
        let (header, length) = self.announced()?;
        if self.payload.len() + self.discarded < length {
            return None;
        }
        self.header_filled = 0;
        self.discarded = 0;
        let payload = std::mem::take(&mut self.payload);
        Some(if header.length > MAX_PAYLOAD {
            Frame::Oversized(header)
        } else {
            Frame::Whole(header, payload)
        })
    }

    /// Reads what is there, at most to the end of the current part.
    fn read_some(&mut self) -> io::Result<usize> {
        let Some((header, length)) = self.announced() else {
            let rest = self
                .header
                .get_mut(self.header_filled..)
                .unwrap_or_default();
            let count = self.stream.try_read(rest)?;
            self.header_filled += count;
            return Ok(count);
        };
        let mut chunk = [0; CHUNK];
        let wanted = length
            .saturating_sub(self.payload.len() + self.discarded)
            .min(CHUNK);
        let count = self
            .stream
            .try_read(chunk.get_mut(..wanted).unwrap_or_default())?;
        if header.length > MAX_PAYLOAD {
            self.discarded += count;
        } else {
            // Memory grows with what arrives, not with what was announced.
            self.payload
                .extend_from_slice(chunk.get(..count).unwrap_or_default());
        }
        Ok(count)
    }
}

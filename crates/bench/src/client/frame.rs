//! ttrpc's frames: ten bytes of header, and a message. Written by hand, since the crate's client
//! has threads of its own for each connection, which would be measured too.

use std::io::{self, Read, Write};

const HEADER: usize = 10;
/// As both sides of ttrpc have it.
const MAX_PAYLOAD: usize = 4 << 20;
pub(super) const REQUEST: u8 = 1;
pub(super) const RESPONSE: u8 = 2;

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) stream: u32,
    pub(super) kind: u8,
    pub(super) payload: Vec<u8>,
}

impl Frame {
    /// Reads one; none at the end of the connection.
    pub(super) fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER];
        match from.read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        }
        let (&length, rest) = header.split_first_chunk().unwrap_or((&[0; 4], &[]));
        let (&stream, rest) = rest.split_first_chunk().unwrap_or((&[0; 4], &[]));
        let length = u32::from_be_bytes(length) as usize;
        if length > MAX_PAYLOAD {
            return Err(io::Error::other(format!("a frame of {length} bytes")));
        }
        let mut payload = vec![0; length];
        from.read_exact(&mut payload)?;
        Ok(Some(Self {
            stream: u32::from_be_bytes(stream),
            kind: rest.first().copied().unwrap_or_default(),
            payload,
        }))
    }

    /// Writes it by one call.
    pub(super) fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let length = u32::try_from(self.payload.len()).map_err(io::Error::other)?;
        let mut bytes = Vec::with_capacity(HEADER + self.payload.len());
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(&self.stream.to_be_bytes());
        bytes.extend_from_slice(&[self.kind, 0]);
        bytes.extend_from_slice(&self.payload);
        to.write_all(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let frame = Frame {
            stream: 3,
            kind: REQUEST,
            payload: b"hello".to_vec(),
        };
        let mut bytes = Vec::new();
        frame.write(&mut bytes).unwrap();
        assert_eq!(bytes[..HEADER], [0, 0, 0, 5, 0, 0, 0, 3, 1, 0]);
        let mut from = bytes.as_slice();
        assert_eq!(Frame::read(&mut from).unwrap(), Some(frame));
        assert_eq!(Frame::read(&mut from).unwrap(), None);
    }

    #[test]
    fn a_huge_frame_is_refused() {
        let bytes = [0xff; HEADER];
        assert!(Frame::read(&mut bytes.as_slice()).is_err());
    }
}

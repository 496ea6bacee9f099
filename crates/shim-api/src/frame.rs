//! ttrpc's wire format: a header of ten bytes and a payload of at most 4 MiB. Pure.

use protobuf::Message;
use ttrpc::{Request, Response, Status};

/// The bytes of a header.
pub const HEADER: usize = 10;
/// The longest payload ttrpc allows.
pub const MAX_PAYLOAD: u32 = 4 << 20;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A call.
    Request,
    /// The answer to a call.
    Response,
    /// A part of a streaming call.
    Data,
    /// A kind of a later protocol.
    Unknown(u8),
}

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The bytes of the payload.
    pub length: u32,
    /// The call that it belongs to. The streams of a client's calls are odd, and rise.
    pub stream: u32,
    /// What the frame is.
    pub kind: Kind,
    /// Flags of streaming calls, which no service here has.
    pub flags: u8,
}

impl Header {
    /// Reads a header. There is no invalid one: what it says is checked where it is used.
    pub fn decode(bytes: [u8; HEADER]) -> Self {
        let [l0, l1, l2, l3, s0, s1, s2, s3, kind, flags] = bytes;
        let kind = match kind {
            1 => Kind::Request,
            2 => Kind::Response,
            3 => Kind::Data,
            other => Kind::Unknown(other),
        };
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        Self {
            length,
            stream: u32::from_be_bytes([s0, s1, s2, s3]),
            kind,
            flags,
        }
    }

    /// The bytes of this header.
    pub fn encode(self) -> [u8; HEADER] {
        let [l0, l1, l2, l3] = self.length.to_be_bytes();
        let [s0, s1, s2, s3] = self.stream.to_be_bytes();
        let kind = match self.kind {
            Kind::Request => 1,
            Kind::Response => 2,
            Kind::Data => 3,
            Kind::Unknown(other) => other,
        };
        [l0, l1, l2, l3, s0, s1, s2, s3, kind, self.flags]
    }
}

/// The bytes of a frame; `None` if the message is too long for one.
fn encode(kind: Kind, stream: u32, message: &impl Message) -> Option<Vec<u8>> {
    let length = u32::try_from(message.compute_size())
        .ok()
        .filter(|&length| length <= MAX_PAYLOAD)?;
    let mut bytes = Vec::with_capacity(HEADER + usize::try_from(length).ok()?);
    bytes.extend_from_slice(
        &Header {
            length,
            stream,
            kind,
            flags: 0,
        }
        .encode(),
    );
    message.write_to_vec(&mut bytes).ok()?;
    Some(bytes)
}

/// The frame of a call; `None` if it is too long.
pub fn request(stream: u32, request: &Request) -> Option<Vec<u8>> {
    encode(Kind::Request, stream, request)
}

/// The frame of an answer. An answer that is too long becomes an error that says so, as with Go's
/// server.
pub fn response(stream: u32, result: Result<Vec<u8>, Status>) -> Vec<u8> {
    let mut response = Response::new();
    match result {
        Ok(payload) => {
            response.payload = payload;
            response.set_status(ttrpc::get_status(ttrpc::Code::OK, ""));
        }
        Err(status) => response.set_status(status),
    }
    encode(Kind::Response, stream, &response).unwrap_or_else(|| {
        let mut short = Response::new();
        short.set_status(ttrpc::get_status(
            ttrpc::Code::RESOURCE_EXHAUSTED,
            "the answer is longer than 4 MiB",
        ));
        encode(Kind::Response, stream, &short).unwrap_or_default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_ten_bytes_are_a_header_and_come_back(bytes: [u8; HEADER]) {
            prop_assert_eq!(Header::decode(bytes).encode(), bytes);
        }

        #[test]
        fn a_request_survives_the_wire(stream: u32, service: String, payload: Vec<u8>) {
            let sent = Request { service, payload, ..Request::default() };
            let bytes = request(stream, &sent).unwrap();
            let header = Header::decode(bytes[..HEADER].try_into().unwrap());
            prop_assert_eq!((header.kind, header.stream), (Kind::Request, stream));
            prop_assert_eq!(header.length as usize, bytes.len() - HEADER);
            prop_assert_eq!(Request::parse_from_bytes(&bytes[HEADER..]).unwrap(), sent);
        }
    }

    #[test]
    fn an_answer_that_is_too_long_becomes_an_error() {
        let bytes = response(3, Ok(vec![0; MAX_PAYLOAD as usize]));
        let response = Response::parse_from_bytes(&bytes[HEADER..]).unwrap();
        assert_eq!(response.status().code(), ttrpc::Code::RESOURCE_EXHAUSTED);
    }
}

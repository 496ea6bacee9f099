//! A message and its prefix: a byte for compression, four for the length. Pure.

use std::io;

use super::status::{Code, Status};

/// The bytes of the prefix.
pub(crate) const PREFIX: usize = 5;

/// A message with its prefix.
pub(crate) fn framed(message: &[u8]) -> io::Result<Vec<u8>> {
    let length = u32::try_from(message.len()).map_err(io::Error::other)?;
    let mut framed = Vec::with_capacity(PREFIX + message.len());
    framed.push(0);
    framed.extend(length.to_be_bytes());
    framed.extend(message);
    Ok(framed)
}

/// The one message of a whole stream.
pub(crate) fn unframed(mut bytes: Vec<u8>) -> Result<Vec<u8>, Status> {
    let invalid = |text: &str| Status::new(Code::InvalidArgument, text);
    let message = bytes.split_off(bytes.len().min(PREFIX));
    let &[compression, a, b, c, d] = bytes.as_slice() else {
        return Err(invalid("there is no message"));
    };
    if compression != 0 {
        return Err(Status::new(
            Code::Unimplemented,
            "compressed messages are not understood",
        ));
    }
    if usize::try_from(u32::from_be_bytes([a, b, c, d])) != Ok(message.len()) {
        return Err(invalid("it is not one message"));
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_message_and_nothing_else_is_read() {
        for message in [&b""[..], b"x", &[0; 1000]] {
            assert_eq!(unframed(framed(message).unwrap()).unwrap(), message);
        }
        for bad in [
            &b""[..],
            b"\0\0\0\0",
            b"\0\0\0\0\x01",
            b"\0\0\0\0\0x",
            b"\x01\0\0\0\0",
            b"\0\xff\xff\xff\xff",
        ] {
            assert!(unframed(bad.to_vec()).is_err(), "{bad:?}");
        }
    }
}

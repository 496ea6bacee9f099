//! [`Status`]: how a call failed, as gRPC's clients read it.

use std::fmt::Write as _;

use embedshim_core::ErrorKind;

/// The longest text of a status: it is in a header.
const MAX_TEXT: usize = 4096;

/// gRPC's codes, those that are used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Code {
    /// What a Go error without a class becomes.
    Unknown = 2,
    /// The request is wrong in itself.
    InvalidArgument = 3,
    /// It took too long.
    DeadlineExceeded = 4,
    /// There is no such thing.
    NotFound = 5,
    /// There is one already.
    AlreadyExists = 6,
    /// A limit is reached.
    ResourceExhausted = 8,
    /// The request does not fit the state.
    FailedPrecondition = 9,
    /// There is no such method.
    Unimplemented = 12,
    /// A defect.
    Internal = 13,
    /// The server leaves; the client may try again.
    Unavailable = 14,
}

impl From<ErrorKind> for Code {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::NotFound => Self::NotFound,
            ErrorKind::AlreadyExists => Self::AlreadyExists,
            ErrorKind::FailedPrecondition => Self::FailedPrecondition,
            ErrorKind::InvalidArgument => Self::InvalidArgument,
            ErrorKind::Unimplemented => Self::Unimplemented,
            ErrorKind::ResourceExhausted => Self::ResourceExhausted,
            ErrorKind::DeadlineExceeded => Self::DeadlineExceeded,
            _ => Self::Unknown,
        }
    }
}

/// How a call failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Its class.
    pub code: Code,
    /// Its text.
    pub text: String,
}

impl Status {
    /// A failure of this class.
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        Self {
            code,
            text: text.into(),
        }
    }

    /// The text as a header has it: printable ASCII, other bytes as `%XX`, cut at a limit.
    pub(super) fn encoded(&self) -> String {
        let mut encoded = String::new();
        for byte in self.text.bytes() {
            if encoded.len() > MAX_TEXT {
                encoded.push_str("...");
                break;
            }
            match byte {
                b' '..=b'~' if byte != b'%' => encoded.push(char::from(byte)),
                // Writing to a string cannot fail.
                byte => drop(write!(encoded, "%{byte:02X}")),
            }
        }
        encoded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_a_header_whatever_is_in_it() {
        let status = Status::new(Code::Unknown, "100% of\n\"ä\"");
        assert_eq!(status.encoded(), "100%25 of%0A\"%C3%A4\"");
        let long = Status::new(Code::Unknown, "x".repeat(1 << 20));
        assert!(long.encoded().len() < MAX_TEXT + 10);
    }
}

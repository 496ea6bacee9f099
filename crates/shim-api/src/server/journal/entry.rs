//! The bytes of a journal: its header and its entries. Owns the format; never opens a file.

use std::io;

use embedshim_core::id::Namespace;

/// The format, by its name in the header.
const MAGIC: [u8; 8] = *b"embconn1";
/// The header: the format, the namespace's length and the namespace.
pub(super) const HEADER_SIZE: usize = 128;
pub(super) const HEADER: u64 = HEADER_SIZE as u64;
/// An entry's kind, stream, length and checksum.
pub(super) const PREFIX: usize = 13;

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A whole request frame, about to be consumed.
    Request = 1,
    /// The request of this stream is answered.
    Answered = 2,
    /// A part of a frame that has not arrived as a whole, about to be consumed.
    Part = 3,
    /// It is consumed.
    PartConsumed = 4,
    /// The end of an answer that did not fit into the socket.
    Rest = 5,
    /// It is sent.
    RestSent = 6,
    /// So many bytes of a payload that is too long, about to be thrown away.
    Skipped = 7,
    /// What the request of this stream is about to be answered, and could not be answered again.
    Outcome = 8,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        [
            Self::Request,
            Self::Answered,
            Self::Part,
            Self::PartConsumed,
            Self::Rest,
            Self::RestSent,
            Self::Skipped,
            Self::Outcome,
        ]
        .into_iter()
        .find(|&kind| kind as u8 == byte)
    }
}

/// An entry as it was read.
pub(super) struct Entry<'a> {
    pub(super) kind: Kind,
    pub(super) stream: u32,
    pub(super) payload: &'a [u8],
    pub(super) is_sound: bool,
}

impl<'a> Entry<'a> {
    /// The first entry and what comes after it; `None` at the end, or where nothing more can be made out.
    pub(super) fn split(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (prefix, rest) = bytes.split_first_chunk::<PREFIX>()?;
        let [kind, s0, s1, s2, s3, l0, l1, l2, l3, c0, c1, c2, c3] = *prefix;
        let kind = Kind::of(kind)?;
        let stream = u32::from_le_bytes([s0, s1, s2, s3]);
        let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).ok()?;
        let (payload, after) = rest.split_at_checked(length)?;
        let is_sound = u32::from_le_bytes([c0, c1, c2, c3]) == checksum(kind, stream, payload);
        let entry = Self {
            kind,
            stream,
            payload,
            is_sound,
        };
        Some((entry, after))
    }
}

pub(super) fn entry(kind: Kind, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(PREFIX + payload.len());
    bytes.push(kind as u8);
    bytes.extend_from_slice(&stream.to_le_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&checksum(kind, stream, payload).to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn checksum(kind: Kind, stream: u32, payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&[kind as u8]);
    hasher.update(&stream.to_le_bytes());
    hasher.update(payload);
    hasher.finalize()
}

pub(super) fn header(namespace: Option<&Namespace>) -> [u8; HEADER_SIZE] {
    let mut header = [0; HEADER_SIZE];
    let name = namespace.map_or("", Namespace::as_str).as_bytes();
    let parts = MAGIC
        .into_iter()
        .chain(u8::try_from(name.len()).ok())
        .chain(name.iter().copied());
    for (place, byte) in header.iter_mut().zip(parts) {
        *place = byte;
    }
    header
}

pub(super) fn namespace_of(header: &[u8]) -> io::Result<Option<Namespace>> {
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let rest = header
        .strip_prefix(&MAGIC)
        .ok_or_else(|| invalid("not a journal of this version".into()))?;
    let (&length, rest) = rest
        .split_first()
        .ok_or_else(|| invalid("no header".into()))?;
    let name = rest.get(..usize::from(length)).unwrap_or_default();
    if name.is_empty() {
        return Ok(None);
    }
    let name = String::from_utf8_lossy(name);
    let parsed = name
        .parse()
        .map_err(|_| invalid(format!("namespace {name:?}")))?;
    Ok(Some(parsed))
}

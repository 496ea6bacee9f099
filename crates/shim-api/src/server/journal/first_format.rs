//! Journals of the first format, as a daemon of an earlier version left them: one header, and
//! entries whose head is there once and without a checksum. Owns reading them; none is written.

use embedshim_core::id::Namespace;

use super::entry::{Entry, Kind, Piece};

const MAGIC: [u8; 8] = *b"embconn1";
const HEADER: usize = 128;
/// An entry's kind, stream, length and checksum.
const PREFIX: usize = 13;

/// The namespace in a header, and the entries.
pub(super) fn split_header(bytes: &[u8]) -> Option<(Option<Namespace>, &[u8])> {
    let (header, entries) = bytes.split_first_chunk::<HEADER>()?;
    let (&length, rest) = header.strip_prefix(&MAGIC)?.split_first()?;
    match rest.get(..usize::from(length))? {
        [] => Some((None, entries)),
        name => Some((Some(std::str::from_utf8(name).ok()?.parse().ok()?), entries)),
    }
}

/// The first entry and what comes after it; `None` at the end, or where nothing can be made out.
pub(super) fn split(bytes: &[u8]) -> Option<(Piece<'_>, &[u8])> {
    let (prefix, rest) = bytes.split_first_chunk::<PREFIX>()?;
    let [kind, s0, s1, s2, s3, l0, l1, l2, l3, c0, c1, c2, c3] = *prefix;
    let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).ok()?;
    let (payload, after) = rest.split_at_checked(length)?;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&[kind, s0, s1, s2, s3]);
    hasher.update(payload);
    let is_sound = hasher.finalize() == u32::from_le_bytes([c0, c1, c2, c3]);
    let kind = Kind::of(kind)?;
    // How much was skipped was in the payload.
    let stream = match (kind, payload.first_chunk()) {
        (Kind::Skipped, Some(count)) => u32::from_le_bytes(*count),
        _ => u32::from_le_bytes([s0, s1, s2, s3]),
    };
    let entry = Entry {
        kind: Some(kind),
        stream,
        payload,
        is_sound,
    };
    Some((Piece::Entry(entry), after))
}

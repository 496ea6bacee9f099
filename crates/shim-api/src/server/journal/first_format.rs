//! Journals of the first format, as a daemon of an earlier version left them: one header, and
//! entries whose head is there once and without a checksum. Owns reading them; none is written.

use embedshim_core::id::Namespace;

use super::format::{Identity, Kind};
use crate::appendlog::{First, Framing, Tag};

const MAGIC: [u8; 8] = *b"embconn1";
const HEADER_SIZE: usize = 128;
/// The bytes of a header.
pub(super) const HEADER: u64 = HEADER_SIZE as u64;

/// Whose connection a journal of this format is of; `None` if the bytes are none.
pub(super) fn read_header(bytes: &[u8]) -> Option<Identity> {
    let (header, _) = bytes.split_first_chunk::<HEADER_SIZE>()?;
    let (&length, rest) = header.strip_prefix(&MAGIC)?.split_first()?;
    let namespace: Option<Namespace> = match rest.get(..usize::from(length))? {
        [] => None,
        name => Some(std::str::from_utf8(name).ok()?.parse().ok()?),
    };
    Some(Identity {
        namespace,
        creation: None,
    })
}

/// The framing of the first format: an entry's kind, stream, length and checksum.
#[derive(Debug)]
pub(super) enum FirstFormat {}

impl Framing for FirstFormat {
    type Tag = Tag;
    const PREFIX: usize = 13;
    const BEGINNING: usize = Self::PREFIX;

    /// A journal of this format ends where nothing can be made out.
    fn first(bytes: &[u8]) -> First<'_, Tag> {
        read(bytes).unwrap_or(First::Torn)
    }

    fn can_begin(_: &[u8]) -> bool {
        false
    }
}

fn read(bytes: &[u8]) -> Option<First<'_, Tag>> {
    let (prefix, rest) = bytes.split_first_chunk::<{ FirstFormat::PREFIX }>()?;
    let [kind, s0, s1, s2, s3, l0, l1, l2, l3, c0, c1, c2, c3] = *prefix;
    let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).ok()?;
    let payload = rest.get(..length)?;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&[kind, s0, s1, s2, s3]);
    hasher.update(payload);
    let is_sound = hasher.finalize() == u32::from_le_bytes([c0, c1, c2, c3]);
    // How much was skipped was in the payload.
    let number = match (Kind::of(kind)?, payload.first_chunk()) {
        (Kind::Skipped, Some(count)) => u32::from_le_bytes(*count),
        _ => u32::from_le_bytes([s0, s1, s2, s3]),
    };
    Some(First::Entry {
        tag: Tag { kind, number },
        payload,
        is_sound,
    })
}

//! The bytes of an outbox file: what its header says, what its entries are, and its name. Owns the
//! meaning of both; how entries are framed is [`Marked`]'s. Never opens a file.

use std::fmt::Write as _;

use crate::appendlog::{Marked, Piece, Pieces, open_seal, seal};

/// The format, by its name in the header.
const MAGIC: [u8; 8] = *b"embevnt1";
/// The header: the format, where the first unacknowledged entry is and the checksum of that, the
/// length of the address and the address.
const HEADER_SIZE: usize = 160;
/// The bytes of a header.
pub(super) const HEADER: u64 = HEADER_SIZE as u64;
/// Where the header says which entry is the first unacknowledged one.
pub(super) const FIRST_AT: u64 = 8;
/// A socket's path is not longer, so nothing can listen on a longer address.
pub(super) const LONGEST_ADDRESS: usize = 108;

/// What a file says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Contents {
    pub(super) address: String,
    /// Where the first of `events` begins.
    pub(super) first: u64,
    /// Where the last of `events` ends.
    pub(super) end: u64,
    /// The unacknowledged events: how many bytes of the file each takes, and itself. Damaged bytes
    /// count for the event behind them.
    pub(super) events: Vec<(u64, Vec<u8>)>,
    /// Bytes that mean nothing, between the entries or behind them.
    pub(super) lost: u64,
}

impl Contents {
    /// Reads a file; `None` if it is not an outbox of this format.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let header = bytes.first_chunk::<HEADER_SIZE>()?;
        let (address, first) = read_header(header)?;
        let length = bytes.len() as u64;
        // A file that was cut back in its predecessor's last moment ends before the place that is
        // noted.
        let first = first.min(length).max(HEADER);
        let mut contents = Self {
            address,
            first,
            end: first,
            events: Vec::new(),
            lost: 0,
        };
        for piece in Pieces::<Marked>::new(bytes, first) {
            if let Piece::Entry { payload, place, .. } = piece {
                contents.lost += place.start.saturating_sub(contents.end);
                let span = place.end.saturating_sub(contents.end);
                contents.events.push((span, payload.to_vec()));
                contents.end = place.end;
            }
        }
        contents.lost += length.saturating_sub(contents.end);
        Some(contents)
    }
}

/// The bytes of a header of a file whose first unacknowledged entry begins at `first`.
pub(super) fn header(address: &str, first: u64) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER_SIZE);
    header.extend(MAGIC);
    header.extend(first_field(first));
    header.extend(u8::try_from(address.len()));
    header.extend(address.bytes());
    header.resize(HEADER_SIZE, 0);
    header
}

/// What is written at [`FIRST_AT`].
pub(super) fn first_field(first: u64) -> Vec<u8> {
    seal(first.to_le_bytes().to_vec())
}

/// The address, and where the first unacknowledged entry is: the first of all if that is damaged.
fn read_header(header: &[u8]) -> Option<(String, u64)> {
    let rest = header.strip_prefix(&MAGIC)?;
    let (field, rest) = rest.split_first_chunk::<12>()?;
    let first = open_seal(field)
        .and_then(|place| place.first_chunk())
        .map_or(HEADER, |place| u64::from_le_bytes(*place));
    let (&length, rest) = rest.split_first()?;
    let address = rest.get(..usize::from(length))?;
    Some((String::from_utf8(address.to_vec()).ok()?, first))
}

/// The name of an address's file: its bytes in hexadecimal digits, so that no two have the same and
/// none leads elsewhere.
pub(super) fn file_name(address: &str) -> String {
    let mut name = String::with_capacity(2 * address.len());
    for byte in address.bytes() {
        let _ = write!(name, "{byte:02x}");
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(bytes: &[u8]) -> Vec<Vec<u8>> {
        let contents = Contents::read(bytes).unwrap();
        let events = contents.events.into_iter();
        events.map(|(_, event)| event).collect()
    }

    #[test]
    fn a_damaged_place_means_that_all_is_sent_again() {
        let mut bytes = header("/a", HEADER + 15);
        bytes.extend(Marked::entry(b"one"));
        bytes.extend(Marked::entry(b"two"));
        assert_eq!(events(&bytes), [b"two".to_vec()]);
        bytes[9] ^= 1;
        assert_eq!(events(&bytes), [b"one".to_vec(), b"two".to_vec()]);
    }

    #[test]
    fn a_name_is_one_component_for_every_address() {
        assert_eq!(file_name("../a"), "2e2e2f61");
        assert!(file_name(&"/".repeat(LONGEST_ADDRESS)).len() < 240);
    }
}

//! The bytes of an outbox file: its header and its entries, and the file's name. Owns the format; never opens a file.

use std::fmt::Write as _;

/// The format, by its name in the header.
const MAGIC: [u8; 8] = *b"embevnt1";
/// The header: the format, the first unacknowledged entry's place and its checksum, the address' length and the address.
pub(super) const HEADER_SIZE: usize = 160;
pub(super) const HEADER: u64 = HEADER_SIZE as u64;
/// Where the header says which entry is the first unacknowledged one.
pub(super) const FIRST_AT: u64 = 8;
/// A socket's path is not longer, so nobody can listen on a longer address.
pub(super) const LONGEST_ADDRESS: usize = 108;
/// Begins each entry, so that the next one is found behind a damaged one. No text in UTF-8 contains it.
const MARK: [u8; 4] = [0xff, 0xfe, 0xff, 0xfe];
/// An entry's mark, length and checksum.
const PREFIX: usize = 12;

/// What a file says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Contents {
    pub(super) address: String,
    /// Where the first of `events` begins.
    pub(super) first: u64,
    /// The unacknowledged events: how many bytes of the file each takes, and itself. What is damaged counts for the next.
    pub(super) events: Vec<(u64, Vec<u8>)>,
    /// Bytes that mean nothing, between the entries or behind them.
    pub(super) lost: usize,
}

impl Contents {
    /// Reads a file; `None` if it is not one of ours.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let (header, entries) = bytes.split_first_chunk::<HEADER_SIZE>()?;
        let (address, first) = read_header(header)?;
        // The file was cut back in its predecessor's last moment: then it ends before the place that is noted.
        let first = first.min(u64::try_from(bytes.len()).ok()?).max(HEADER);
        let acknowledged = usize::try_from(first.checked_sub(HEADER)?).ok()?;
        let mut contents = Self {
            address,
            first,
            events: Vec::new(),
            lost: 0,
        };
        let mut rest = entries.get(acknowledged..)?;
        while let Some((skipped, payload, after)) = next(rest) {
            let span = u64::try_from(rest.len() - after.len()).ok()?;
            contents.events.push((span, payload.to_vec()));
            contents.lost += skipped;
            rest = after;
        }
        contents.lost += rest.len();
        Some(contents)
    }
}

/// The next sound entry: how many bytes before it are none, its payload, and what comes after it.
fn next(bytes: &[u8]) -> Option<(usize, &[u8], &[u8])> {
    let mut skipped = 0;
    loop {
        let here = bytes.get(skipped..)?;
        if let Some((payload, after)) = split(here) {
            return Some((skipped, payload, after));
        }
        let mark = here.get(1..)?.windows(MARK.len()).position(is_mark)?;
        skipped += 1 + mark;
    }
}

fn is_mark(bytes: &[u8]) -> bool {
    bytes == MARK
}

fn split(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (prefix, rest) = bytes.split_first_chunk::<PREFIX>()?;
    let [m0, m1, m2, m3, l0, l1, l2, l3, c0, c1, c2, c3] = *prefix;
    let length = u32::from_le_bytes([l0, l1, l2, l3]);
    if [m0, m1, m2, m3] != MARK {
        return None;
    }
    let (payload, after) = rest.split_at_checked(usize::try_from(length).ok()?)?;
    let is_sound = u32::from_le_bytes([c0, c1, c2, c3]) == checksum(length, payload);
    is_sound.then_some((payload, after))
}

/// An entry; its payload is an event.
pub(super) fn entry(payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(PREFIX + payload.len());
    bytes.extend_from_slice(&MARK);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&checksum(length, payload).to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn checksum(length: u32, payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&length.to_le_bytes());
    hasher.update(payload);
    hasher.finalize()
}

/// The header of a file whose first unacknowledged entry begins at `first`.
pub(super) fn header(address: &str, first: u64) -> [u8; HEADER_SIZE] {
    let mut header = [0; HEADER_SIZE];
    let parts = MAGIC
        .into_iter()
        .chain(first_field(first))
        .chain(u8::try_from(address.len()).ok())
        .chain(address.bytes());
    for (place, byte) in header.iter_mut().zip(parts) {
        *place = byte;
    }
    header
}

/// What is written at [`FIRST_AT`].
pub(super) fn first_field(first: u64) -> [u8; 12] {
    let mut field = [0; 12];
    let sum = crc32fast::hash(&first.to_le_bytes());
    let bytes = first.to_le_bytes().into_iter().chain(sum.to_le_bytes());
    for (place, byte) in field.iter_mut().zip(bytes) {
        *place = byte;
    }
    field
}

/// The address, and where the first unacknowledged entry is: the first of all if that is damaged.
fn read_header(header: &[u8]) -> Option<(String, u64)> {
    let rest = header.strip_prefix(&MAGIC)?;
    let (field, rest) = rest.split_first_chunk::<12>()?;
    let place = field.first_chunk().copied().map(u64::from_le_bytes)?;
    let first = if first_field(place) == *field {
        place
    } else {
        HEADER
    };
    let (&length, rest) = rest.split_first()?;
    let address = rest.get(..usize::from(length))?;
    Some((String::from_utf8(address.to_vec()).ok()?, first))
}

/// The file of an address: its bytes in hexadecimal digits, so that no two have the same and none leads elsewhere.
pub(super) fn file_name(address: &str) -> String {
    let mut name = String::with_capacity(2 * address.len());
    for byte in address.bytes() {
        let _ = write!(name, "{byte:02x}");
    }
    name
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(address: &str, payloads: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = header(address, HEADER).to_vec();
        for payload in payloads {
            bytes.extend(entry(payload));
        }
        bytes
    }

    fn events(bytes: &[u8]) -> Vec<Vec<u8>> {
        let contents = Contents::read(bytes).unwrap();
        contents
            .events
            .into_iter()
            .map(|(_, event)| event)
            .collect()
    }

    #[test]
    fn a_damaged_entry_is_lost_alone_even_in_its_length() {
        let payloads = [b"one".to_vec(), b"two".to_vec(), b"three".to_vec()];
        let second = HEADER_SIZE + PREFIX + 3;
        for at in second..second + PREFIX + 3 {
            let mut bytes = file("/a", &payloads);
            bytes[at] ^= 0x55;
            let left = [b"one".to_vec(), b"three".to_vec()];
            assert_eq!(events(&bytes), left, "byte {at}");
        }
    }

    #[test]
    fn a_damaged_place_means_that_all_is_sent_again() {
        let mut bytes = header("/a", HEADER + 15).to_vec();
        bytes.extend(entry(b"one"));
        bytes.extend(entry(b"two"));
        assert_eq!(events(&bytes), [b"two".to_vec()]);
        bytes[9] ^= 1;
        assert_eq!(events(&bytes), [b"one".to_vec(), b"two".to_vec()]);
    }

    #[test]
    fn a_name_is_one_component_for_every_address() {
        assert_eq!(file_name("../a"), "2e2e2f61");
        assert!(file_name(&"/".repeat(LONGEST_ADDRESS)).len() < 240);
    }

    proptest! {
        #[test]
        fn any_prefix_has_the_entries_that_are_whole_in_it(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..8),
            cut in any::<prop::sample::Index>(),
        ) {
            let bytes = file("/run/a.sock", &payloads);
            let length = cut.index(bytes.len() + 1);
            match Contents::read(&bytes[..length]) {
                None => prop_assert!(length < HEADER_SIZE),
                Some(contents) => {
                    let mut end = HEADER_SIZE;
                    let fits = |payload: &&Vec<u8>| { end += PREFIX + payload.len(); end <= length };
                    let whole: Vec<_> = payloads.iter().take_while(fits).cloned().collect();
                    let read: Vec<_> = contents.events.into_iter().map(|(_, event)| event).collect();
                    prop_assert_eq!(read, whole);
                }
            }
        }

        #[test]
        fn any_flipped_byte_costs_one_entry_or_the_file(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..8),
            place in any::<prop::sample::Index>(),
            flip in 1..=255u8,
        ) {
            let mut bytes = file("/run/a.sock", &payloads);
            let at = place.index(bytes.len());
            bytes[at] ^= flip;
            if let Some(contents) = Contents::read(&bytes) {
                prop_assert!(contents.events.len() + 1 >= payloads.len());
                let spans: u64 = contents.events.iter().map(|(span, _)| span).sum();
                prop_assert!(contents.first + spans <= bytes.len() as u64);
            }
        }

        #[test]
        fn garbage_is_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let mut garbage = header("/a", HEADER).to_vec();
            garbage.extend(&bytes);
            let _ = (Contents::read(&bytes), Contents::read(&garbage));
        }
    }
}

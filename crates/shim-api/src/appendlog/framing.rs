//! How entries lie in a log: what stands before a payload, so that a reader finds the next entry
//! behind a damaged one. Owns the bytes of an entry; never opens a file, and never knows what an
//! entry means.

/// The bytes of a checksum.
const CHECKSUM: usize = 4;

/// How the entries of a log are framed.
pub(crate) trait Framing {
    /// What an entry says beside its payload.
    type Tag;
    /// The bytes before a payload.
    const PREFIX: usize;
    /// How many bytes tell whether an entry can begin here.
    const BEGINNING: usize;

    /// Reads the entry at the beginning of these bytes.
    fn first(bytes: &[u8]) -> First<'_, Self::Tag>;

    /// Whether an entry can begin with these [`BEGINNING`](Self::BEGINNING) bytes.
    fn can_begin(bytes: &[u8]) -> bool;
}

/// What the first bytes of some are.
#[derive(Debug)]
pub(crate) enum First<'a, T> {
    /// An entry.
    Entry {
        /// What the entry says beside its payload.
        tag: T,
        /// The payload of the entry; if that is damaged, as it was read.
        payload: &'a [u8],
        /// Whether the payload has its checksum.
        is_sound: bool,
    },
    /// An entry that is not there as a whole: its writer was killed.
    Torn,
    /// No entry that can be read.
    Damage,
}

/// These bytes and their checksum.
pub(crate) fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

/// The bytes before a checksum at their end, if it is theirs.
pub(crate) fn open_seal(sealed: &[u8]) -> Option<&[u8]> {
    let (bytes, checksum) = sealed.split_last_chunk::<CHECKSUM>()?;
    (crc32fast::hash(bytes) == u32::from_le_bytes(*checksum)).then_some(bytes)
}

/// Entries with a head that is there twice: one damaged byte does not hide how long an entry is, so
/// that it costs at most the entry's payload.
///
/// A head is the kind, the number, the length and the checksum of the payload, and its own
/// checksum.
#[derive(Debug)]
pub(crate) enum DoubleHead {}

/// What an entry says beside its payload. Its user gives both fields their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tag {
    pub(crate) kind: u8,
    pub(crate) number: u32,
}

/// What a head says.
struct Head {
    tag: Tag,
    length: u32,
    payload_checksum: u32,
}

impl DoubleHead {
    const HEAD: usize = 17;

    /// The bytes of an entry.
    pub(crate) fn entry(tag: Tag, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let mut head = Vec::with_capacity(Self::PREFIX + payload.len());
        head.push(tag.kind);
        head.extend(tag.number.to_le_bytes());
        head.extend(length.to_le_bytes());
        head.extend(crc32fast::hash(payload).to_le_bytes());
        let mut entry = seal(head);
        entry.extend_from_within(..);
        entry.extend_from_slice(payload);
        entry
    }

    fn head(bytes: &[u8]) -> Option<Head> {
        let fields = open_seal(bytes)?.first_chunk()?;
        let [kind, n0, n1, n2, n3, l0, l1, l2, l3, c0, c1, c2, c3] = *fields;
        Some(Head {
            tag: Tag {
                kind,
                number: u32::from_le_bytes([n0, n1, n2, n3]),
            },
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            payload_checksum: u32::from_le_bytes([c0, c1, c2, c3]),
        })
    }
}

impl Framing for DoubleHead {
    type Tag = Tag;
    const PREFIX: usize = 2 * Self::HEAD;
    const BEGINNING: usize = Self::PREFIX;

    fn first(bytes: &[u8]) -> First<'_, Tag> {
        let Some((heads, rest)) = bytes.split_at_checked(Self::PREFIX) else {
            return First::Torn;
        };
        let (first, second) = heads.split_at(Self::HEAD);
        let Some(head) = Self::head(first).or_else(|| Self::head(second)) else {
            return First::Damage;
        };
        match payload(rest, head.length) {
            None => First::Torn,
            Some(payload) => First::Entry {
                tag: head.tag,
                payload,
                is_sound: crc32fast::hash(payload) == head.payload_checksum,
            },
        }
    }

    fn can_begin(bytes: &[u8]) -> bool {
        bytes
            .split_at_checked(Self::HEAD)
            .is_some_and(|(first, second)| first == second && Self::head(first).is_some())
    }
}

/// Entries that begin with a mark: a damaged byte costs the entry, and the next one is found by its
/// mark. Shorter than [`DoubleHead`], for payloads that say themselves what they are.
///
/// Behind the mark are the length of the payload, and the checksum of the two.
#[derive(Debug)]
pub(crate) enum Marked {}

impl Marked {
    /// No text in UTF-8 contains it.
    const MARK: [u8; 4] = [0xff, 0xfe, 0xff, 0xfe];

    /// The bytes of an entry.
    pub(crate) fn entry(payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(Self::PREFIX + payload.len());
        bytes.extend(Self::MARK);
        bytes.extend(length.to_le_bytes());
        bytes.extend(Self::checksum(length, payload).to_le_bytes());
        bytes.extend(payload);
        bytes
    }

    fn checksum(length: u32, payload: &[u8]) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&length.to_le_bytes());
        hasher.update(payload);
        hasher.finalize()
    }

    fn sound(bytes: &[u8]) -> Option<&[u8]> {
        let (prefix, rest) = bytes.split_first_chunk::<{ Self::PREFIX }>()?;
        let [m0, m1, m2, m3, l0, l1, l2, l3, c0, c1, c2, c3] = *prefix;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let payload = payload(rest, length)?;
        let is_sound = [m0, m1, m2, m3] == Self::MARK
            && Self::checksum(length, payload) == u32::from_le_bytes([c0, c1, c2, c3]);
        is_sound.then_some(payload)
    }
}

impl Framing for Marked {
    type Tag = ();
    const PREFIX: usize = 12;
    const BEGINNING: usize = 4;

    fn first(bytes: &[u8]) -> First<'_, ()> {
        match Self::sound(bytes) {
            None => First::Damage,
            Some(payload) => First::Entry {
                tag: (),
                payload,
                is_sound: true,
            },
        }
    }

    fn can_begin(bytes: &[u8]) -> bool {
        bytes == Self::MARK
    }
}

fn payload(bytes: &[u8], length: u32) -> Option<&[u8]> {
    bytes.get(..usize::try_from(length).ok()?)
}

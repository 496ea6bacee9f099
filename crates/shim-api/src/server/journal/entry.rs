//! The bytes of a journal: its header and its entries. Owns the format; never opens a file.
//!
//! A journal begins with its header, which is there twice. An entry begins with its head, which is
//! there twice as well; so a reader finds the next entry, and whose request it was about, if one of
//! the two is sound. If neither is, it searches for the next entry.

use embedshim_core::id::{ContainerId, Namespace};
use embedshim_core::task::BundleId;

use super::first_format;
use crate::server::Creation;

/// The format, by its name in the header.
const MAGIC: [u8; 8] = *b"embconn2";
/// One of the two headers: the format; the namespace and the container's id, each with its length;
/// the bundle's device and inode; and a checksum.
const HALF: usize = 192;
const ID_AT: usize = 88;
const BUNDLE_AT: usize = HALF - 20;
const HEADER_SIZE: usize = 2 * HALF;
pub(super) const HEADER: u64 = HEADER_SIZE as u64;
/// A head: kind, stream, length and checksum of the payload, and the head's own checksum.
const HEAD: usize = 17;
/// What comes before an entry's payload.
pub(super) const PREFIX: usize = 2 * HEAD;

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A whole request frame, about to be consumed. Without a payload: the parts before it need no
    /// answer.
    Request = 1,
    /// The request of this stream is answered.
    Answered = 2,
    /// A part of a frame that has not arrived as a whole, about to be consumed.
    Part = 3,
    /// It is consumed.
    PartConsumed = 4,
    /// The end of an answer that did not fit into the socket; or, with a stream, a whole answer.
    /// Each is noted twice.
    Rest = 5,
    /// It is sent.
    RestSent = 6,
    /// So many bytes of a payload that is too long, about to be thrown away. The number stands
    /// where others have their stream.
    Skipped = 7,
    /// What the request of this stream is about to be answered, and could not be answered again.
    /// Each is noted twice.
    Outcome = 8,
    /// What the next part and those before it make of a frame's header. Where others have their
    /// stream, there is how much of it is of those before.
    FrameHeader = 9,
    /// The request of this stream cannot be read any more.
    Lost = 10,
}

impl Kind {
    pub(super) fn of(byte: u8) -> Option<Self> {
        [
            Self::Request,
            Self::Answered,
            Self::Part,
            Self::PartConsumed,
            Self::Rest,
            Self::RestSent,
            Self::Skipped,
            Self::Outcome,
            Self::FrameHeader,
            Self::Lost,
        ]
        .into_iter()
        .find(|&kind| kind as u8 == byte)
    }
}

/// An entry as it was read.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    /// `None` if a newer version has written it.
    pub(super) kind: Option<Kind>,
    pub(super) stream: u32,
    pub(super) payload: &'a [u8],
    pub(super) is_sound: bool,
}

/// What comes next in a journal.
#[derive(Debug)]
pub(super) enum Piece<'a> {
    /// An entry.
    Entry(Entry<'a>),
    /// So many bytes in which no entry can be made out.
    Gap(usize),
}

/// What a head says.
#[derive(Clone, Copy, Debug)]
struct Head {
    kind: u8,
    stream: u32,
    length: u32,
    payload_checksum: u32,
}

impl Head {
    fn encode(self) -> [u8; HEAD] {
        let mut bytes = [0; HEAD];
        let fields = [self.kind]
            .into_iter()
            .chain(self.stream.to_le_bytes())
            .chain(self.length.to_le_bytes())
            .chain(self.payload_checksum.to_le_bytes());
        for (place, byte) in bytes.iter_mut().zip(fields) {
            *place = byte;
        }
        if let Some((fields, place)) = bytes.split_last_chunk_mut() {
            *place = crc32fast::hash(fields).to_le_bytes();
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (head, _) = bytes.split_first_chunk::<HEAD>()?;
        let (fields, own) = head.split_last_chunk()?;
        if crc32fast::hash(fields) != u32::from_le_bytes(*own) {
            return None;
        }
        let [kind, s0, s1, s2, s3, l0, l1, l2, l3, c0, c1, c2, c3, ..] = *head;
        Some(Self {
            kind,
            stream: u32::from_le_bytes([s0, s1, s2, s3]),
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            payload_checksum: u32::from_le_bytes([c0, c1, c2, c3]),
        })
    }
}

/// The next piece and what comes after it. `None` at the end, and where a daemon was killed within
/// its last write.
pub(super) fn split(bytes: &[u8]) -> Option<(Piece<'_>, &[u8])> {
    let (prefix, rest) = bytes.split_first_chunk::<PREFIX>()?;
    let (first, second) = prefix.split_at_checked(HEAD)?;
    let Some(head) = Head::decode(first).or_else(|| Head::decode(second)) else {
        let length = next_entry(bytes);
        return Some((Piece::Gap(length), bytes.get(length..)?));
    };
    let (payload, after) = rest.split_at_checked(usize::try_from(head.length).ok()?)?;
    let entry = Entry {
        kind: Kind::of(head.kind),
        stream: head.stream,
        payload,
        is_sound: head.payload_checksum == crc32fast::hash(payload),
    };
    Some((Piece::Entry(entry), after))
}

/// Where the next entry begins whose two heads are sound; or the end.
fn next_entry(bytes: &[u8]) -> usize {
    let is_entry = |prefix: &[u8]| {
        prefix
            .split_at_checked(HEAD)
            .is_some_and(|(first, second)| first == second && Head::decode(first).is_some())
    };
    let mut places = bytes.windows(PREFIX).skip(1);
    places
        .position(is_entry)
        .map_or(bytes.len(), |before| before + 1)
}

pub(super) fn entry(kind: Kind, stream: u32, payload: &[u8]) -> Vec<u8> {
    let head = Head {
        kind: kind as u8,
        stream,
        length: u32::try_from(payload.len()).unwrap_or(u32::MAX),
        payload_checksum: crc32fast::hash(payload),
    };
    let head = head.encode();
    [head.as_slice(), &head, payload].concat()
}

/// Whose connection it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::server) struct Identity {
    pub(in crate::server) namespace: Option<Namespace>,
    pub(in crate::server) creation: Option<Creation>,
}

/// What a header says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Header {
    Sound(Identity),
    /// Of the first format, which had no second header.
    FirstFormat(Identity),
    /// Whose connection it is is lost.
    Damaged,
}

impl Header {
    /// Reads it, and returns what comes after it. `None` if its writer was killed before it was
    /// written.
    pub(super) fn split(bytes: &[u8]) -> Option<(Self, &[u8])> {
        if let Some((namespace, entries)) = first_format::split_header(bytes) {
            let identity = Identity {
                namespace,
                creation: None,
            };
            return Some((Self::FirstFormat(identity), entries));
        }
        let (halves, entries) = bytes.split_first_chunk::<HEADER_SIZE>()?;
        let (first, second) = halves.split_at_checked(HALF)?;
        let identity = decode_half(first).or_else(|| decode_half(second));
        Some((identity.map_or(Self::Damaged, Self::Sound), entries))
    }
}

fn decode_half(half: &[u8]) -> Option<Identity> {
    let (fields, own) = half.split_last_chunk()?;
    if crc32fast::hash(fields) != u32::from_le_bytes(*own) {
        return None;
    }
    let namespace = name_in(fields.strip_prefix(&MAGIC)?)?;
    let id = name_in(fields.get(ID_AT..)?)?;
    let (device, inode) = fields.get(BUNDLE_AT..)?.split_first_chunk()?;
    let (inode, _) = inode.split_first_chunk()?;
    let bundle = BundleId {
        device: u64::from_le_bytes(*device),
        inode: u64::from_le_bytes(*inode),
    };
    Some(Identity {
        namespace: namespace.parse().ok(),
        creation: id.parse().ok().map(|id| Creation { id, bundle }),
    })
}

/// The text that begins with its length.
fn name_in(bytes: &[u8]) -> Option<&str> {
    let (&length, rest) = bytes.split_first()?;
    std::str::from_utf8(rest.get(..usize::from(length))?).ok()
}

pub(super) fn header(identity: &Identity) -> Vec<u8> {
    let namespace = identity.namespace.as_ref();
    let id = identity.creation.as_ref().map(|creation| &creation.id);
    // Each has at most 76 bytes.
    let name = namespace.map_or("", Namespace::as_str).as_bytes();
    let id = id.map_or("", ContainerId::as_str).as_bytes();
    let mut half = Vec::with_capacity(HALF);
    half.extend(MAGIC);
    half.extend(u8::try_from(name.len()));
    half.extend(name);
    half.resize(ID_AT, 0);
    half.extend(u8::try_from(id.len()));
    half.extend(id);
    half.resize(BUNDLE_AT, 0);
    let bundle = identity.creation.as_ref().map(|creation| creation.bundle);
    let (device, inode) = bundle.map_or((0, 0), |bundle| (bundle.device, bundle.inode));
    half.extend(device.to_le_bytes());
    half.extend(inode.to_le_bytes());
    half.extend(crc32fast::hash(&half).to_le_bytes());
    half.repeat(2)
}

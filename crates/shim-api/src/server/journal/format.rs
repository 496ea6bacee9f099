//! The bytes of a journal: what its header says and what its entries are. Owns the meaning of both;
//! how entries are framed is [`DoubleHead`]'s. Never opens a file.
//!
//! The header is there twice, so that one damaged byte does not cost a connection its namespace.

use embedshim_core::id::{ContainerId, Namespace};
use embedshim_core::task::BundleId;

use crate::appendlog::{DoubleHead, Tag, open_seal, seal};
use crate::server::handler::Creation;

/// The format, by its name in the header.
const MAGIC: [u8; 8] = *b"embconn2";
/// One of the two headers: the format; the namespace and the container's id, each with its length;
/// the bundle's device and inode; and a checksum.
const HALF: usize = 192;
const ID_AT: usize = 88;
const BUNDLE_AT: usize = HALF - 20;
const HEADER_SIZE: usize = 2 * HALF;
/// The bytes of a header.
pub(super) const HEADER: u64 = HEADER_SIZE as u64;

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
    /// The part, or the skipped bytes, noted last are consumed.
    PartConsumed = 4,
    /// The end of an answer that did not fit into the socket; or, with a stream, a whole answer.
    /// Each is noted twice.
    Rest = 5,
    /// The rest of an answer that was noted last is sent.
    RestSent = 6,
    /// Bytes of a payload that is too long, about to be thrown away. How many stands where other
    /// kinds have their stream.
    Skipped = 7,
    /// What the request of this stream is about to be answered, and could not be answered again.
    /// Each is noted twice.
    Outcome = 8,
    /// What the next part and the parts before it make of a frame's header. How many bytes of it
    /// are of the parts before stands where other kinds have their stream.
    FrameHeader = 9,
    /// The request of this stream cannot be read any more.
    Lost = 10,
}

impl Kind {
    /// The kind that this byte stands for; `None` if a newer version has written it.
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

/// The bytes of an entry about this stream.
pub(super) fn entry(kind: Kind, stream: u32, payload: &[u8]) -> Vec<u8> {
    let tag = Tag {
        kind: kind as u8,
        number: stream,
    };
    DoubleHead::entry(tag, payload)
}

/// Whose connection it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::server) struct Identity {
    pub(in crate::server) namespace: Option<Namespace>,
    pub(in crate::server) creation: Option<Creation>,
}

/// The bytes of a header.
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
    seal(half).repeat(2)
}

/// What a header says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Header {
    /// Whose connection it is.
    Sound(Identity),
    /// Both headers are damaged: it is lost whose connection it is.
    Damaged,
}

impl Header {
    /// Reads the header at the beginning of these bytes. `None` if its writer was killed before all
    /// of it was written.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let (halves, _) = bytes.split_first_chunk::<HEADER_SIZE>()?;
        let (first, second) = halves.split_at_checked(HALF)?;
        let identity = read_half(first).or_else(|| read_half(second));
        Some(identity.map_or(Self::Damaged, Self::Sound))
    }
}

fn read_half(half: &[u8]) -> Option<Identity> {
    let fields = open_seal(half)?;
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

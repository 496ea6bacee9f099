//! [`Recovered`]: what a journal says of a connection that another daemon has left. Owns reading
//! it, whatever state it is in: a piece that makes no sense costs requests their answers, and it is
//! known which. Never writes to a journal.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use tracing::warn;

use super::format::{HEADER, Identity, Kind};
use super::lost::{MOST_LOST, UnknownRequests};
use crate::appendlog::{DoubleHead, Framing, Piece, Pieces, Tag};
use crate::frame;

/// What a journal says.
#[derive(Debug, Default)]
pub(in crate::server) struct Recovered {
    /// The connection's number, for log lines.
    connection: u64,
    pub(in crate::server) identity: Identity,
    /// The header was damaged, and with it the namespace.
    pub(in crate::server) is_namespace_lost: bool,
    /// The frames of requests that are not answered, by stream.
    pub(in crate::server) pending: BTreeMap<u32, Vec<u8>>,
    /// Where their entries are in the journal.
    pub(super) places: BTreeMap<u32, Range<u64>>,
    /// What those of them were about to be answered that cannot be answered again; `None` if that
    /// was damaged.
    pub(in crate::server) outcomes: BTreeMap<u32, Option<Vec<u8>>>,
    /// Streams whose request cannot be read any more.
    pub(in crate::server) unreadable: BTreeSet<u32>,
    /// There were requests of which not even the stream is known.
    pub(in crate::server) unknown: Option<UnknownRequests>,
    /// The beginning of a frame that has not arrived as a whole.
    pub(in crate::server) partial: Partial,
    /// The last entry is a part, which is consumed or still in the socket.
    pub(in crate::server) is_part_maybe_consumed: bool,
    /// The last entry is this stream's request, which is consumed or still in the socket.
    pub(in crate::server) maybe_consumed: Option<u32>,
    /// The end of an answer, to be sent before anything else.
    pub(in crate::server) rest: Vec<u8>,
    /// Whether the next frame begins where the socket's bytes do.
    pub(in crate::server) framing: FrameStart,
    /// Where the last piece ends.
    pub(super) end: u64,
    /// The stream of the last request frame that was noted.
    last: Option<u32>,
    /// What the next part begins with, and how much of that is of the parts before.
    frame_header: Option<(Vec<u8>, usize)>,
    /// The stream of an answer whose rest is damaged; 0 if it is not known.
    damaged_rest: Option<u32>,
}

/// The beginning of a frame that comes in parts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::server) struct Partial {
    /// What was consumed of it.
    pub(in crate::server) bytes: Vec<u8>,
    /// How many bytes were consumed and thrown away, since the frame is too long.
    pub(in crate::server) skipped: usize,
    /// Some of the payload is wrong; its length is right, and its header.
    pub(in crate::server) is_damaged: bool,
}

/// Where the next frame begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::server) enum FrameStart {
    /// Where the entries say.
    #[default]
    Known,
    /// Entries are lost: at the next byte, if that looks like the beginning of a frame.
    Presumed,
    /// Nothing tells: the connection was left within a frame, or within an answer, whose length is
    /// lost.
    Lost,
}

/// An entry, as it was read.
struct Entry<'a> {
    stream: u32,
    payload: &'a [u8],
    is_sound: bool,
    place: Range<u64>,
}

impl Recovered {
    /// What is known of a connection whose journal cannot be read at all.
    pub(super) fn nothing() -> Self {
        Self {
            unknown: Some(UnknownRequests::ALL),
            framing: FrameStart::Presumed,
            ..Self::default()
        }
    }

    /// What a journal says; without an identity if its header is damaged.
    pub(super) fn read(connection: u64, identity: Option<Identity>, bytes: &[u8]) -> Self {
        let is_namespace_lost = identity.is_none();
        if is_namespace_lost {
            warn!(
                connection,
                "connection journal: its header is damaged: the connection's namespace is lost"
            );
        }
        let identity = identity.unwrap_or_default();
        let mut read = Self::read_entries::<DoubleHead>(connection, identity, bytes, HEADER);
        read.is_namespace_lost = is_namespace_lost;
        read
    }

    /// What the entries from `start` on say, in any framing.
    pub(super) fn read_entries<F: Framing<Tag = Tag>>(
        connection: u64,
        identity: Identity,
        bytes: &[u8],
        start: u64,
    ) -> Self {
        let mut recovered = Self {
            connection,
            identity,
            end: start,
            ..Self::default()
        };
        for piece in Pieces::<F>::new(bytes, start) {
            // What is perhaps in the socket still is what the last entry says.
            (recovered.maybe_consumed, recovered.is_part_maybe_consumed) = (None, false);
            match piece {
                Piece::Gap(place) => {
                    recovered.end = place.end;
                    recovered.add_gap(&place);
                }
                Piece::Entry {
                    tag,
                    payload,
                    is_sound,
                    place,
                } => {
                    recovered.end = place.end;
                    let entry = Entry {
                        stream: tag.number,
                        payload,
                        is_sound,
                        place,
                    };
                    recovered.add(Kind::of(tag.kind), entry);
                }
            }
        }
        recovered.finish();
        recovered
    }

    fn add(&mut self, kind: Option<Kind>, entry: Entry<'_>) {
        let (connection, stream) = (self.connection, entry.stream);
        if !entry.is_sound {
            warn!(
                connection,
                stream,
                ?kind,
                "connection journal: an entry is damaged"
            );
        }
        let Some(kind) = kind else {
            warn!(
                connection,
                stream, "connection journal: an entry is of a newer version: its request is lost"
            );
            if stream != 0 {
                self.lose(stream);
            }
            return;
        };
        match kind {
            Kind::Request => self.add_request(entry),
            Kind::Answered => self.add_answered(stream),
            Kind::Lost => self.lose(stream),
            Kind::Outcome => {
                let outcome = self.outcomes.entry(stream).or_default();
                if entry.is_sound {
                    *outcome = Some(entry.payload.to_vec());
                }
            }
            Kind::FrameHeader if entry.is_sound => {
                let before = usize::try_from(stream).unwrap_or_default();
                self.frame_header = Some((entry.payload.to_vec(), before));
            }
            Kind::FrameHeader | Kind::PartConsumed => {}
            Kind::Part => self.add_part(&entry),
            Kind::Skipped => {
                self.is_part_maybe_consumed = true;
                let count = usize::try_from(stream).unwrap_or_default();
                self.partial.skipped = self.partial.skipped.saturating_add(count);
            }
            Kind::Rest => self.add_rest(&entry),
            Kind::RestSent => {
                self.rest.clear();
                self.damaged_rest = None;
            }
        }
    }

    fn add_request(&mut self, entry: Entry<'_>) {
        self.partial = Partial::default();
        self.framing = FrameStart::Known;
        if entry.payload.is_empty() {
            return;
        }
        let stream = entry.stream;
        if let Some(unknown) = self.unknown.take() {
            self.unreadable.extend(unknown.before(stream));
        }
        self.last = Some(stream);
        if entry.is_sound {
            self.maybe_consumed = Some(stream);
            self.pending.insert(stream, entry.payload.to_vec());
            self.places.insert(stream, entry.place);
        } else {
            self.lose(stream);
        }
    }

    fn add_answered(&mut self, stream: u32) {
        self.remove(stream);
        self.unreadable.remove(&stream);
    }

    fn add_part(&mut self, entry: &Entry<'_>) {
        self.is_part_maybe_consumed = true;
        let header = self.frame_header.take();
        if let Some((header, before)) = &header
            && self.framing != FrameStart::Known
        {
            self.partial.bytes = header.get(..*before).unwrap_or_default().to_vec();
            self.framing = FrameStart::Known;
        }
        self.partial.bytes.extend_from_slice(entry.payload);
        if entry.is_sound {
            return;
        }
        // The header says how long the frame is.
        let before = self.partial.bytes.len().saturating_sub(entry.payload.len());
        match header {
            Some((header, _)) => {
                for (place, byte) in self.partial.bytes.iter_mut().zip(&header) {
                    *place = *byte;
                }
                self.partial.is_damaged |= self.partial.bytes.len() > header.len();
            }
            None if before >= frame::HEADER => self.partial.is_damaged = true,
            None => self.framing = FrameStart::Lost,
        }
    }

    fn add_rest(&mut self, entry: &Entry<'_>) {
        if entry.is_sound {
            self.rest = entry.payload.to_vec();
            self.damaged_rest = None;
            // It may be all of a refusal.
            self.add_answered(entry.stream);
        } else if self.rest.len() != entry.payload.len() {
            // Each rest is noted twice, and this is not the second note of a sound one.
            self.rest.clear();
            self.damaged_rest = Some(entry.stream);
        }
    }

    /// What there was may have been requests, the answers of those before, or parts of a frame.
    fn add_gap(&mut self, place: &Range<u64>) {
        let length = place.end.saturating_sub(place.start);
        warn!(
            connection = self.connection,
            bytes = length,
            "connection journal: damaged: the requests before and in the damage are lost"
        );
        for stream in std::mem::take(&mut self.pending).into_keys() {
            self.lose(stream);
        }
        let unknown = self
            .unknown
            .get_or_insert(UnknownRequests::after(self.last));
        let count = length / DoubleHead::PREFIX as u64;
        unknown.add(u32::try_from(count).unwrap_or(MOST_LOST).max(1));
        self.framing = FrameStart::Presumed;
        self.partial = Partial::default();
        self.frame_header = None;
        // A whole answer can be sent twice, a part of one cannot.
        if !self.rest.is_empty() && !is_whole_answer(&self.rest) {
            self.rest.clear();
            self.damaged_rest = Some(0);
        }
    }

    /// The request of this stream is to be answered with `DATA_LOSS`.
    fn lose(&mut self, stream: u32) {
        self.remove(stream);
        self.unreadable.insert(stream);
    }

    fn remove(&mut self, stream: u32) {
        self.pending.remove(&stream);
        self.places.remove(&stream);
        self.outcomes.remove(&stream);
    }

    fn finish(&mut self) {
        match self.damaged_rest {
            None => {}
            Some(0) => self.framing = FrameStart::Lost,
            // It was the whole answer.
            Some(stream) => self.lose(stream),
        }
        if self.framing == FrameStart::Presumed && !self.partial.bytes.is_empty() {
            self.framing = FrameStart::Lost;
        }
    }
}

fn is_whole_answer(bytes: &[u8]) -> bool {
    let header = bytes.first_chunk().copied().map(frame::Header::decode);
    header.is_some_and(|header| {
        header.kind == frame::Kind::Response
            && usize::try_from(header.length).ok() == bytes.len().checked_sub(frame::HEADER)
    })
}

//! [`Recovered`]: what a journal says of a connection that another daemon has left. Owns reading
//! it, whatever state it is in: a piece that makes no sense costs requests their answers, and is
//! known to have done so.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::path::Path;

use tracing::warn;

use super::entry::{self, Entry, HEADER, Header, Identity, Kind, PREFIX, Piece};
use super::{Journal, LONGEST, first_format};
use crate::frame;

/// The most requests that are taken for lost in a gap: as many as a connection has under way.
const MOST_LOST: u32 = 1024;

/// Takes the next piece from the bytes of a journal.
type Split = fn(&[u8]) -> Option<(Piece<'_>, &[u8])>;

/// What a journal says.
#[derive(Debug, Default)]
pub(in crate::server) struct Recovered {
    pub(in crate::server) identity: Identity,
    /// The header was damaged, and with it the namespace.
    pub(in crate::server) is_namespace_lost: bool,
    /// Whole request frames that nobody has answered, by stream.
    pub(in crate::server) pending: BTreeMap<u32, Vec<u8>>,
    /// What those of them were about to be answered that cannot be answered again; `None` if that
    /// was damaged.
    pub(in crate::server) outcomes: BTreeMap<u32, Option<Vec<u8>>>,
    /// Streams whose request cannot be read any more.
    pub(in crate::server) unreadable: BTreeSet<u32>,
    /// There were requests of which not even the stream is known.
    pub(in crate::server) unknown: Option<Unknown>,
    pub(in crate::server) partial: Partial,
    /// The last entry is a part, so perhaps it is still in the socket.
    pub(in crate::server) part_is_doubtful: bool,
    /// The last entry is this stream's request, so perhaps it is still in the socket.
    pub(in crate::server) doubtful: Option<u32>,
    /// The end of an answer, to be sent before anything else.
    pub(in crate::server) rest: Vec<u8>,
    /// Whether the next frame begins where the socket's bytes do.
    pub(in crate::server) framing: Framing,
    /// Of the last request frame that was noted.
    last: Option<u32>,
    /// What the next part begins with, and how much of that is of the parts before.
    frame_header: Option<(Vec<u8>, usize)>,
    /// A rest that is damaged, and its stream.
    damaged_rest: Option<u32>,
}

/// The beginning of a frame that comes in parts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::server) struct Partial {
    pub(in crate::server) bytes: Vec<u8>,
    /// How much of it was thrown away.
    pub(in crate::server) skipped: usize,
    /// Some of it is wrong: its length is right, and its header.
    pub(in crate::server) is_damaged: bool,
}

/// Where the next frame begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::server) enum Framing {
    /// As the entries say.
    #[default]
    Known,
    /// Entries are lost: at the next byte, if that looks like it.
    Presumed,
    /// Within a frame whose length is lost, or whose answer's end is.
    Lost,
}

/// Requests of which no more is known than how many they are at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::server) struct Unknown {
    /// They came after this stream's.
    after: Option<u32>,
    at_most: u32,
}

impl Unknown {
    /// Of a journal that is gone as a whole.
    const ALL: Self = Self {
        after: None,
        at_most: MOST_LOST,
    };

    /// Their streams, if this is the first request that came after them: those of Go's client
    /// follow each other.
    pub(in crate::server) fn before(self, next: u32) -> impl Iterator<Item = u32> {
        let after = self.after.unwrap_or(0);
        let span = self.at_most.saturating_mul(2);
        let first = next.saturating_sub(span).max(after.saturating_add(1));
        (first..next).filter(|stream| stream % 2 == 1)
    }

    /// Their streams, if nothing is known of what came after them, but of what came before.
    pub(in crate::server) fn after_last(self) -> Option<impl Iterator<Item = u32>> {
        let after = self.after?;
        let span = self.at_most.saturating_mul(2);
        Some(self.before(after.saturating_add(span).saturating_add(1)))
    }
}

impl Recovered {
    /// Of a journal that cannot be read at all.
    pub(super) fn nothing() -> Self {
        Self {
            unknown: Some(Unknown::ALL),
            framing: Framing::Presumed,
            ..Self::default()
        }
    }

    pub(super) fn read(path: &Path) -> io::Result<(Journal, Self)> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut bytes = Vec::new();
        // No journal of ours is longer.
        (&file).take(LONGEST).read_to_end(&mut bytes)?;
        match Header::split(&bytes) {
            // Nothing is read from a connection before its journal has a header.
            None => {
                super::write_header(&file, &Identity::default())?;
                let journal = Journal::new(path.to_owned(), Some(file), HEADER);
                Ok((journal, Self::default()))
            }
            Some((Header::FirstFormat(identity), entries)) => {
                let mut scratch = Journal::none();
                let recovered = Self::of(identity, entries, first_format::split, &mut scratch);
                let journal = Journal::written_again(path, &recovered)?;
                Ok((journal, recovered))
            }
            Some((header, entries)) => Self::go_on(path, file, header, entries),
        }
    }

    fn go_on(
        path: &Path,
        file: File,
        header: Header,
        entries: &[u8],
    ) -> io::Result<(Journal, Self)> {
        let mut journal = Journal::new(path.to_owned(), Some(file), HEADER);
        let (identity, is_damaged) = match header {
            Header::Sound(identity) | Header::FirstFormat(identity) => (identity, false),
            Header::Damaged => (Identity::default(), true),
        };
        let mut recovered = Self::of(identity, entries, entry::split, &mut journal);
        if is_damaged {
            warn!(path = %path.display(), "a connection's namespace was damaged in its journal");
            recovered.is_namespace_lost = true;
        }
        // A daemon that dies within a write leaves a piece of an entry; what it was about is still
        // in the socket.
        if let Some(file) = &journal.file {
            file.set_len(journal.length)?;
        }
        journal.is_amid = !recovered.partial.bytes.is_empty();
        journal.has_rest = !recovered.rest.is_empty();
        Ok((journal, recovered))
    }

    fn of(identity: Identity, entries: &[u8], split: Split, journal: &mut Journal) -> Self {
        let mut recovered = Self {
            identity,
            ..Self::default()
        };
        let mut rest = entries;
        while let Some((piece, after)) = split(rest) {
            match piece {
                Piece::Entry(entry) => recovered.add(&entry, journal),
                Piece::Gap(length) => recovered.add_gap(length, journal),
            }
            journal.length += (rest.len() - after.len()) as u64;
            rest = after;
        }
        recovered.finish(journal);
        recovered
    }

    fn add(&mut self, entry: &Entry<'_>, journal: &mut Journal) {
        (self.doubtful, self.part_is_doubtful) = (None, false);
        let stream = entry.stream;
        if !entry.is_sound {
            warn!(path = %journal.path.display(), stream, kind = ?entry.kind, "an entry of a journal is damaged");
        }
        let Some(kind) = entry.kind else {
            warn!(path = %journal.path.display(), stream, "an entry of a journal is of a newer version");
            if stream != 0 {
                self.lose(stream, journal);
            }
            return;
        };
        match kind {
            Kind::Outcome => {
                journal.outcomes.insert(stream);
                let outcome = self.outcomes.entry(stream).or_default();
                if entry.is_sound {
                    *outcome = Some(entry.payload.to_vec());
                }
            }
            Kind::Request => self.add_request(entry, journal),
            Kind::Answered => self.add_answered(stream, journal),
            Kind::FrameHeader if entry.is_sound => {
                let before = usize::try_from(stream).unwrap_or_default();
                self.frame_header = Some((entry.payload.to_vec(), before));
            }
            Kind::Part => self.add_part(entry),
            Kind::Skipped => {
                self.part_is_doubtful = true;
                let count = usize::try_from(stream).unwrap_or_default();
                self.partial.skipped = self.partial.skipped.saturating_add(count);
            }
            Kind::FrameHeader | Kind::PartConsumed => {}
            Kind::Rest if entry.is_sound => {
                self.rest = entry.payload.to_vec();
                self.damaged_rest = None;
                // It may be all of a refusal.
                self.add_answered(stream, journal);
            }
            // The same one was noted just before.
            Kind::Rest if self.rest.len() == entry.payload.len() => {}
            Kind::Rest => {
                self.rest.clear();
                self.damaged_rest = Some(stream);
            }
            Kind::RestSent => {
                self.rest.clear();
                self.damaged_rest = None;
            }
            Kind::Lost => self.lose(stream, journal),
        }
    }

    fn add_request(&mut self, entry: &Entry<'_>, journal: &mut Journal) {
        self.partial = Partial::default();
        self.framing = Framing::Known;
        if entry.payload.is_empty() {
            return;
        }
        let stream = entry.stream;
        if let Some(unknown) = self.unknown.take() {
            self.unreadable.extend(unknown.before(stream));
        }
        self.last = Some(stream);
        if entry.is_sound {
            self.doubtful = Some(stream);
            self.pending.insert(stream, entry.payload.to_vec());
            let size = PREFIX + entry.payload.len();
            journal.pending.insert(stream, (journal.length, size));
        } else {
            self.lose(stream, journal);
        }
    }

    fn add_answered(&mut self, stream: u32, journal: &mut Journal) {
        self.pending.remove(&stream);
        self.unreadable.remove(&stream);
        self.outcomes.remove(&stream);
        journal.pending.remove(&stream);
        journal.outcomes.remove(&stream);
    }

    fn add_part(&mut self, entry: &Entry<'_>) {
        self.part_is_doubtful = true;
        let header = self.frame_header.take();
        if let Some((header, before)) = &header
            && self.framing != Framing::Known
        {
            self.partial.bytes = header.get(..*before).unwrap_or_default().to_vec();
            self.framing = Framing::Known;
        }
        self.partial.bytes.extend_from_slice(entry.payload);
        if entry.is_sound {
            return;
        }
        // The header says how long the frame is.
        match header {
            Some((header, _)) => {
                for (place, byte) in self.partial.bytes.iter_mut().zip(&header) {
                    *place = *byte;
                }
                self.partial.is_damaged |= self.partial.bytes.len() > header.len();
            }
            None if self.partial.bytes.len() - entry.payload.len() >= frame::HEADER => {
                self.partial.is_damaged = true;
            }
            None => self.framing = Framing::Lost,
        }
    }

    /// What there was may have been requests, the answers of those before, or parts of a frame.
    fn add_gap(&mut self, length: usize, journal: &mut Journal) {
        warn!(path = %journal.path.display(), bytes = length, "a journal is damaged");
        (self.doubtful, self.part_is_doubtful) = (None, false);
        for stream in std::mem::take(&mut self.pending).into_keys() {
            self.lose(stream, journal);
        }
        let count = u32::try_from(length / PREFIX).unwrap_or(MOST_LOST).max(1);
        let unknown = self.unknown.get_or_insert(Unknown {
            after: self.last,
            at_most: 0,
        });
        unknown.at_most = unknown.at_most.saturating_add(count).min(MOST_LOST);
        self.framing = Framing::Presumed;
        self.partial = Partial::default();
        self.frame_header = None;
        // A whole answer can be sent twice, a part of one cannot.
        let is_whole = self
            .rest
            .first_chunk()
            .copied()
            .map(frame::Header::decode)
            .is_some_and(|header| {
                header.kind == frame::Kind::Response
                    && usize::try_from(header.length).ok()
                        == self.rest.len().checked_sub(frame::HEADER)
            });
        if !self.rest.is_empty() && !is_whole {
            self.rest.clear();
            self.damaged_rest = Some(0);
        }
    }

    /// The request of this stream is to be answered with `DATA_LOSS`.
    fn lose(&mut self, stream: u32, journal: &mut Journal) {
        self.pending.remove(&stream);
        self.outcomes.remove(&stream);
        journal.pending.remove(&stream);
        journal.outcomes.remove(&stream);
        self.unreadable.insert(stream);
    }

    fn finish(&mut self, journal: &mut Journal) {
        match self.damaged_rest {
            None => {}
            Some(0) => self.framing = Framing::Lost,
            // It was the whole answer.
            Some(stream) => self.lose(stream, journal),
        }
        if self.framing == Framing::Presumed && !self.partial.bytes.is_empty() {
            self.framing = Framing::Lost;
        }
    }
}

//! [`Recovered`]: what a journal says of a connection that another daemon has left. Owns reading it, whatever state it is in; a piece that
//! makes no sense costs a request its answer, never more.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;

use embedshim_core::id::Namespace;
use tracing::warn;

use super::entry::{Entry, HEADER, HEADER_SIZE, Kind, PREFIX, namespace_of};
use super::{Journal, LONGEST};

/// What a journal says.
#[derive(Debug, Default)]
pub(in crate::server) struct Recovered {
    pub(in crate::server) namespace: Option<Namespace>,
    /// Whole request frames that nobody has answered, by stream.
    pub(in crate::server) pending: BTreeMap<u32, Vec<u8>>,
    /// Streams whose request cannot be read any more.
    pub(in crate::server) unreadable: Vec<u32>,
    /// What those of them were about to be answered that cannot be answered again.
    pub(in crate::server) outcomes: BTreeMap<u32, Vec<u8>>,
    /// The beginning of a frame.
    pub(in crate::server) partial: Vec<u8>,
    /// How much of it was thrown away.
    pub(in crate::server) skipped: usize,
    /// The last entry is a part, so perhaps it is still in the socket.
    pub(in crate::server) part_is_doubtful: bool,
    /// The last entry is this stream's request, so perhaps it is still in the socket.
    pub(in crate::server) doubtful: Option<u32>,
    /// The end of an answer, to be sent before anything else.
    pub(in crate::server) rest: Vec<u8>,
}

impl Recovered {
    pub(super) fn read(path: &Path) -> io::Result<(Journal, Self)> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let length = file.metadata()?.len();
        if !(HEADER..=LONGEST).contains(&length) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{length} bytes"),
            ));
        }
        let bytes = fs::read(path)?;
        let (head, entries) = bytes
            .split_at_checked(HEADER_SIZE)
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut recovered = Self {
            namespace: namespace_of(head)?,
            ..Self::default()
        };
        let mut journal = Journal::new(path.to_owned(), Some(file), HEADER);
        let mut rest = entries;
        while let Some((read, after)) = Entry::split(rest) {
            recovered.add(&read, &mut journal);
            journal.length += (rest.len() - after.len()) as u64;
            rest = after;
        }
        // A daemon that dies within a write leaves a piece of an entry; what it was about is still in the socket.
        if let Some(file) = &journal.file {
            file.set_len(journal.length)?;
        }
        journal.is_amid = !recovered.partial.is_empty();
        journal.has_rest = !recovered.rest.is_empty();
        Ok((journal, recovered))
    }

    fn add(&mut self, entry: &Entry<'_>, journal: &mut Journal) {
        (self.doubtful, self.part_is_doubtful) = (None, false);
        let stream = entry.stream;
        if !entry.is_sound {
            warn!(path = %journal.path.display(), stream, "a request was damaged in the journal");
            if entry.kind == Kind::Request {
                self.unreadable.push(stream);
            }
            return;
        }
        match entry.kind {
            Kind::Outcome => {
                journal.outcomes.insert(stream);
                self.outcomes.insert(stream, entry.payload.to_vec());
            }
            Kind::Request => {
                self.partial.clear();
                self.skipped = 0;
                if entry.payload.is_empty() {
                    return;
                }
                self.doubtful = Some(stream);
                self.pending.insert(stream, entry.payload.to_vec());
                let size = PREFIX + entry.payload.len();
                journal.pending.insert(stream, (journal.length, size));
            }
            Kind::Answered => {
                self.pending.remove(&stream);
                self.unreadable.retain(|&lost| lost != stream);
                self.outcomes.remove(&stream);
                journal.pending.remove(&stream);
                journal.outcomes.remove(&stream);
            }
            Kind::Part => {
                self.part_is_doubtful = true;
                self.partial.extend_from_slice(entry.payload);
            }
            Kind::Skipped => {
                self.part_is_doubtful = true;
                let count = entry
                    .payload
                    .first_chunk()
                    .copied()
                    .map_or(0, u32::from_le_bytes);
                self.skipped += usize::try_from(count).unwrap_or_default();
            }
            Kind::PartConsumed => {}
            Kind::Rest => {
                self.rest = entry.payload.to_vec();
                // It may be all of a refusal.
                self.pending.remove(&stream);
                self.outcomes.remove(&stream);
                journal.pending.remove(&stream);
                journal.outcomes.remove(&stream);
            }
            Kind::RestSent => self.rest.clear(),
        }
    }
}

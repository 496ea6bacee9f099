//! [`Journal`]: what was read from one connection and is not answered yet, on disk, so that another
//! daemon can answer it. Owns which notes are needed, and for how long; the file is a [`Log`]'s.
//! Never looks into a request.
//!
//! The header says whose connection it is; each entry says what happened to one request. When
//! everything is answered, the journal is cut back to its header, so it rarely outgrows its first
//! page.

mod first_format;
mod format;
mod lost;
mod recovery;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use tracing::warn;

use crate::appendlog::{Found, Log};
use crate::{frame, state_dir};
use first_format::FirstFormat;
pub(super) use format::Identity;
use format::{HEADER, Header, Kind, entry, header};
pub(super) use lost::UnknownRequests;
pub(super) use recovery::{FrameStart, Partial, Recovered};

/// The directory of all connections' journals.
#[derive(Clone, Debug)]
pub(super) struct Journals(PathBuf);

impl Journals {
    /// The journals in this directory, which is created if it is missing.
    pub(super) fn open(directory: PathBuf) -> io::Result<Self> {
        let journals = Self(directory);
        journals.create_directory()?;
        Ok(journals)
    }

    /// Creates the directory if it is missing.
    pub(super) fn create_directory(&self) -> io::Result<()> {
        state_dir::create(&self.0)
    }

    /// The journal of a new connection.
    pub(super) fn begin(&self, connection: u64) -> Journal {
        Journal::new(connection, begin(connection, &self.path(connection)))
    }

    /// What another daemon left of a connection, and the journal to go on with.
    pub(super) fn resume(&self, connection: u64) -> (Journal, Recovered) {
        self.try_resume(connection).unwrap_or_else(|error| {
            warn!(connection, %error, "connection journal: cannot read it: unanswered requests are lost");
            (self.begin(connection), Recovered::nothing())
        })
    }

    fn try_resume(&self, connection: u64) -> io::Result<(Journal, Recovered)> {
        let path = self.path(connection);
        let found = Found::read(&path)?;
        if let Some(identity) = first_format::read_header(found.bytes()) {
            let recovered = Recovered::read_entries::<FirstFormat>(
                connection,
                identity,
                found.bytes(),
                first_format::HEADER,
            );
            let journal = Journal::converted(connection, &path, &recovered)?;
            return Ok((journal, recovered));
        }
        let identity = match Header::read(found.bytes()) {
            Some(Header::Sound(identity)) => Some(identity),
            Some(Header::Damaged) => None,
            // Nothing is read from a connection before its journal has a header.
            None => return Ok((self.begin(connection), Recovered::default())),
        };
        let recovered = Recovered::read(connection, identity, found.bytes());
        // A daemon that dies within a write leaves a piece of an entry, which is cut off; the bytes
        // that it was about are still in the socket.
        let log = found.go_on(HEADER, recovered.end)?;
        Ok((Journal::recovered(connection, log, &recovered), recovered))
    }

    /// Removes the journals of all connections but these.
    pub(super) fn remove_all_but(&self, connections: &HashSet<u64>) {
        for entry in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            let number = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            if !number.is_some_and(|number| connections.contains(&number)) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn path(&self, connection: u64) -> PathBuf {
        self.0.join(connection.to_string())
    }
}

/// A new log, in memory if it has to be.
fn begin(connection: u64, path: &Path) -> Option<Log> {
    let header = header(&Identity::default());
    Log::create(path, &header)
        .or_else(|error| {
            warn!(connection, path = %path.display(), %error, "connection: requests are not durable: cannot create its journal");
            Log::in_memory(path, &header)
        })
        .ok()
}

/// The journal of one connection. It ends with the connection, but not with the daemon.
#[derive(Debug)]
pub(super) struct Journal {
    /// The connection's number, for log lines.
    connection: u64,
    /// None if it could not be created, or for a connection that ends with this process.
    log: Option<Log>,
    /// Where the entries of the requests are that are not answered.
    pending: BTreeMap<u32, Range<u64>>,
    /// A part of a frame is noted and the rest has not arrived: nothing may be cut off.
    is_mid_frame: bool,
    /// The rest of an answer is noted and not sent: nothing may be cut off.
    has_rest: bool,
    /// The requests whose outcome is noted and which are not answered: those notes are not moved.
    outcomes: BTreeSet<u32>,
}

impl Journal {
    fn new(connection: u64, log: Option<Log>) -> Self {
        Self {
            connection,
            log,
            pending: BTreeMap::new(),
            is_mid_frame: false,
            has_rest: false,
            outcomes: BTreeSet::new(),
        }
    }

    /// The journal of a connection that ends with this process: nothing is noted.
    pub(super) fn none() -> Self {
        Self::new(0, None)
    }

    /// The journal that was read.
    fn recovered(connection: u64, log: Log, recovered: &Recovered) -> Self {
        Self {
            pending: recovered.places.clone(),
            is_mid_frame: !recovered.partial.bytes.is_empty(),
            has_rest: !recovered.rest.is_empty(),
            outcomes: recovered.outcomes.keys().copied().collect(),
            ..Self::new(connection, Some(log))
        }
    }

    /// What a journal of the first format said, as one of this format in its place.
    fn converted(connection: u64, path: &Path, recovered: &Recovered) -> io::Result<Self> {
        let log = Log::draft(path, &header(&recovered.identity))?;
        let mut journal = Self::new(connection, Some(log));
        journal.note_recovered(recovered);
        if let Some(log) = &mut journal.log {
            log.move_to(path)?;
        }
        Ok(journal)
    }

    fn note_recovered(&mut self, recovered: &Recovered) {
        if !recovered.rest.is_empty() {
            self.rest(&recovered.rest);
        }
        for &stream in &recovered.unreadable {
            self.lost(stream);
        }
        // In order, so that the one that is perhaps not consumed, if there is, is the last entry.
        for (&stream, request) in &recovered.pending {
            self.request(stream, request);
            if let Some(Some(outcome)) = recovered.outcomes.get(&stream) {
                self.outcome(stream, outcome);
            }
        }
        let partial = &recovered.partial;
        if !partial.bytes.is_empty() {
            self.part(&[], &partial.bytes);
        }
        if partial.skipped > 0 {
            self.skipped(partial.skipped);
        }
        if !partial.bytes.is_empty() && !recovered.is_part_maybe_consumed {
            self.part_consumed();
        }
    }

    /// Notes whose connection it is.
    pub(super) fn identity(&mut self, identity: &Identity) {
        if let Some(log) = &self.log
            && let Err(error) = log.write_header(0, &header(identity))
        {
            warn!(connection = self.connection, path = %log.path().display(), %error, "connection journal: cannot write the connection's namespace and bundle");
        }
    }

    /// Notes a whole frame, before it is consumed.
    pub(super) fn request(&mut self, stream: u32, frame: &[u8]) {
        self.append_pending(stream, entry(Kind::Request, stream, frame), &[]);
    }

    /// Notes that this stream's request cannot be read any more, and will be answered so.
    pub(super) fn lost(&mut self, stream: u32) {
        self.append_pending(stream, entry(Kind::Lost, stream, &[]), &[]);
    }

    /// Notes a part of a frame, before it is consumed; `before` is what came of the frame before.
    /// A damaged part of a frame's header would leave the length of the frame unknown, so the
    /// header is noted twice.
    pub(super) fn part(&mut self, before: &[u8], bytes: &[u8]) {
        self.is_mid_frame = true;
        let mut entries = Vec::new();
        if before.len() < frame::HEADER {
            let frame_header: Vec<u8> = before.iter().chain(bytes).copied().collect();
            let length = u32::try_from(before.len()).unwrap_or_default();
            let known = frame_header.get(..frame::HEADER).unwrap_or(&frame_header);
            entries = entry(Kind::FrameHeader, length, known);
        }
        entries.extend(entry(Kind::Part, 0, bytes));
        self.append(&entries);
    }

    /// Notes so many bytes of a payload that is too long, before they are consumed and thrown away.
    pub(super) fn skipped(&mut self, count: usize) {
        self.is_mid_frame = true;
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        self.append(&entry(Kind::Skipped, count, &[]));
    }

    /// Notes that the part, or the skipped bytes, noted last are consumed.
    pub(super) fn part_consumed(&mut self) {
        self.append(&entry(Kind::PartConsumed, 0, &[]));
    }

    /// Notes a frame that came in parts, now that it is whole; its parts are not needed any more.
    pub(super) fn parts_are(&mut self, stream: u32, frame: &[u8]) {
        self.request(stream, frame);
        self.is_mid_frame = false;
    }

    /// Notes that the parts made a request of this stream that cannot be carried out.
    pub(super) fn parts_are_lost(&mut self, stream: u32) {
        let end = entry(Kind::Request, 0, &[]);
        self.append_pending(stream, entry(Kind::Lost, stream, &[]), &end);
        self.is_mid_frame = false;
    }

    /// Notes that the parts made nothing that has to be answered.
    pub(super) fn parts_are_nothing(&mut self) {
        self.append(&entry(Kind::Request, 0, &[]));
        self.is_mid_frame = false;
        if !self.is_needed() {
            self.cut();
        }
    }

    /// Notes what is still to be sent of an answer.
    pub(super) fn rest(&mut self, bytes: &[u8]) {
        self.has_rest = true;
        self.append(&entry(Kind::Rest, 0, bytes).repeat(2));
    }

    /// Notes a refusal before it is sent, and with that its request as answered: a client that has
    /// been refused must not see the request carried out by a successor.
    pub(super) fn refused(&mut self, stream: u32, answer: &[u8]) {
        if self.pending.contains_key(&stream)
            && self
                .append(&entry(Kind::Rest, stream, answer).repeat(2))
                .is_some()
        {
            self.has_rest = true;
            self.pending.remove(&stream);
            self.outcomes.remove(&stream);
        }
    }

    /// Notes that the rest of an answer, or a refusal, is sent, if one was noted.
    pub(super) fn rest_sent(&mut self) {
        if std::mem::take(&mut self.has_rest) {
            self.shrink_or_append(&entry(Kind::RestSent, 0, &[]));
        }
    }

    /// Notes what this stream's request will be answered.
    pub(super) fn outcome(&mut self, stream: u32, answer: &[u8]) {
        if self.pending.contains_key(&stream) {
            self.append(&entry(Kind::Outcome, stream, answer).repeat(2));
            self.outcomes.insert(stream);
        }
    }

    /// Notes that this stream's request is answered.
    pub(super) fn answered(&mut self, stream: u32) {
        self.outcomes.remove(&stream);
        if self.pending.remove(&stream).is_some() {
            self.shrink_or_append(&entry(Kind::Answered, stream, &[]));
        }
    }

    /// Creates the file again if it was removed.
    pub(super) fn recreate(&mut self) {
        if let Some(log) = &mut self.log
            && let Err(error) = log.recreate()
        {
            warn!(connection = self.connection, path = %log.path().display(), %error, "connection: requests are not durable: cannot create its journal again");
        }
    }

    /// Removes the file: the connection is over.
    pub(super) fn remove(&mut self) {
        if let Some(log) = self.log.take() {
            let _ = log.remove();
        }
    }

    /// Appends the entry of a request that is to be answered, and what comes with it.
    fn append_pending(&mut self, stream: u32, mut entry: Vec<u8>, and: &[u8]) {
        let length = entry.len() as u64;
        entry.extend_from_slice(and);
        if let Some(place) = self.append(&entry) {
            let end = place.start.saturating_add(length);
            self.pending.insert(stream, place.start..end);
        }
    }

    fn append(&mut self, entries: &[u8]) -> Option<Range<u64>> {
        let log = self.log.as_mut()?;
        log.append(entries)
            .inspect_err(|error| {
                warn!(connection = self.connection, path = %log.path().display(), %error, "connection: a request is not durable: cannot write its journal");
            })
            .ok()
    }

    fn is_needed(&self) -> bool {
        !self.pending.is_empty() || self.is_mid_frame || self.has_rest
    }

    /// Cuts everything off if nothing is needed any more; otherwise appends this entry.
    fn shrink_or_append(&mut self, entry: &[u8]) {
        if self.is_needed() {
            self.append(entry);
            self.compact();
        } else {
            self.cut();
        }
    }

    fn cut(&mut self) {
        if let Some(log) = &mut self.log {
            // What could not be cut off is answered again, which does no harm.
            let _ = log.cut();
        }
    }

    /// Rewrites a long journal of mostly answered requests.
    fn compact(&mut self) {
        let is_fixed = self.is_mid_frame || self.has_rest || !self.outcomes.is_empty();
        let Some(log) = self.log.as_mut().filter(|_| !is_fixed) else {
            return;
        };
        let places: Vec<Range<u64>> = self.pending.values().cloned().collect();
        let size = |place: &Range<u64>| place.end.saturating_sub(place.start);
        if !log.is_worth_compacting(places.iter().map(size).sum()) {
            return;
        }
        let compacted = log
            .header()
            .and_then(|header| log.compact(&header, &places));
        match compacted {
            Ok(places) => self.pending = self.pending.keys().copied().zip(places).collect(),
            Err(error) => {
                warn!(connection = self.connection, path = %log.path().display(), %error, "connection journal: cannot compact it");
            }
        }
    }
}

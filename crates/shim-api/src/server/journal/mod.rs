//! [`Journal`]: what was read from one connection and is not answered yet, on disk, so that another
//! daemon can answer it. Owns the file, its format and its bounds; never looks into a request.
//!
//! A file begins with a header that says whose connection it is; entries follow, each with its
//! length and checksums. When everything is answered, the file is cut back to the header, so it
//! rarely outgrows its first page. Writes go to tmpfs: they take microseconds and are not waited
//! for elsewhere.

mod entry;
mod first_format;
mod recovery;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use embedshim_core::failpoint;
use nix::sys::memfd::{MFdFlags, memfd_create};
use tracing::warn;

pub(super) use self::entry::Identity;
use self::entry::{HEADER, Kind, entry, header};
pub(super) use self::recovery::{Framing, Partial, Recovered, Unknown};
use crate::frame;

/// A journal with more answered requests than this in it is rewritten.
const COMPACT_FROM: u64 = 64 * 1024;
/// No journal is longer: 4 MiB for the largest request, and as much for the others.
const LONGEST: u64 = 64 << 20;

/// Where all connections' journals are.
#[derive(Clone, Debug)]
pub(super) struct Journals(PathBuf);

impl Journals {
    /// Those in this directory, which is made.
    pub(super) fn open(directory: PathBuf) -> io::Result<Self> {
        let journals = Self(directory);
        journals.make()?;
        Ok(journals)
    }

    /// Makes the directory.
    pub(super) fn make(&self) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.0)
    }

    /// A new connection's.
    pub(super) fn begin(&self, connection: u64) -> Journal {
        let path = self.path(connection);
        let file = new_file(&path).or_else(|error| {
            warn!(path = %path.display(), %error, "connection: requests are not durable: cannot make its journal");
            // In memory, so that nothing is missing when the directory is there again.
            memory()
        });
        Journal::new(path, file.ok(), HEADER)
    }

    /// What another daemon left of a connection, and the journal to go on with.
    pub(super) fn resume(&self, connection: u64) -> (Journal, Recovered) {
        match Recovered::read(&self.path(connection)) {
            Ok((journal, recovered)) => (journal, recovered),
            Err(error) => {
                warn!(connection, %error, "a connection's journal cannot be read: what it asked and was not answered is lost");
                (self.begin(connection), Recovered::nothing())
            }
        }
    }

    /// Removes the journals of all connections but these.
    pub(super) fn keep_only(&self, connections: &[u64]) {
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

/// What stands in for a journal whose directory was removed, until that is made again.
fn memory() -> io::Result<File> {
    let memory = File::from(memfd_create(c"journal", MFdFlags::MFD_CLOEXEC)?);
    write_header(&memory, &Identity::default())?;
    Ok(memory)
}

/// One connection's journal. Ends with the connection, but not with the daemon.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    /// None when it could not be opened, or for a connection that nobody keeps.
    file: Option<File>,
    length: u64,
    /// Where the requests are that are not answered, and how long their entries are.
    pending: BTreeMap<u32, (u64, usize)>,
    /// A frame is half here: nothing may be cut off.
    is_amid: bool,
    /// And so is an answer.
    has_rest: bool,
    /// Whose outcome is noted and not answered yet: those notes are not moved.
    outcomes: BTreeSet<u32>,
}

impl Journal {
    fn new(path: PathBuf, file: Option<File>, length: u64) -> Self {
        Self {
            path,
            file,
            length,
            pending: BTreeMap::new(),
            is_amid: false,
            has_rest: false,
            outcomes: BTreeSet::new(),
        }
    }

    /// The journal of a connection that ends with us.
    pub(super) fn none() -> Self {
        Self::new(PathBuf::new(), None, 0)
    }

    /// Notes a whole frame, before it is consumed.
    pub(super) fn request(&mut self, stream: u32, frame: &[u8]) {
        self.append_pending(stream, entry(Kind::Request, stream, frame), &[]);
    }

    /// Notes that this stream's request cannot be read any more, and will be answered so.
    pub(super) fn lost(&mut self, stream: u32) {
        self.append_pending(stream, entry(Kind::Lost, stream, &[]), &[]);
    }

    /// Notes a part of a frame, before it is consumed; `before` is what came of it before. What is
    /// damaged of a frame's header would leave the length of the frame unknown, so that is noted
    /// twice.
    pub(super) fn part(&mut self, before: &[u8], bytes: &[u8]) {
        self.is_amid = true;
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

    /// Notes so many bytes of a payload that is too long to be kept, before they are consumed.
    pub(super) fn skipped(&mut self, count: usize) {
        self.is_amid = true;
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        self.append(&entry(Kind::Skipped, count, &[]));
    }

    /// And after either of them.
    pub(super) fn part_consumed(&mut self) {
        self.append(&entry(Kind::PartConsumed, 0, &[]));
    }

    /// Notes a frame that came in parts, now that it is whole; its parts are not needed any more.
    pub(super) fn parts_are(&mut self, stream: u32, frame: &[u8]) {
        self.request(stream, frame);
        self.is_amid = false;
    }

    /// Notes that the parts made a request of this stream that cannot be carried out.
    pub(super) fn parts_are_lost(&mut self, stream: u32) {
        let end = entry(Kind::Request, 0, &[]);
        self.append_pending(stream, entry(Kind::Lost, stream, &[]), &end);
        self.is_amid = false;
    }

    /// Notes that the parts made nothing that has to be answered.
    pub(super) fn parts_are_nothing(&mut self) {
        self.append(&entry(Kind::Request, 0, &[]));
        self.is_amid = false;
        self.cut();
    }

    /// Notes what is still to be sent of an answer.
    pub(super) fn rest(&mut self, bytes: &[u8]) {
        self.has_rest = true;
        self.append(&entry(Kind::Rest, 0, bytes).repeat(2));
    }

    /// Notes a refusal before it is sent, and with that its request as answered: who has been
    /// refused must not see it begin anew under our successor.
    pub(super) fn refused(&mut self, stream: u32, answer: &[u8]) {
        if self.pending.contains_key(&stream)
            && self.append(&entry(Kind::Rest, stream, answer).repeat(2))
        {
            self.has_rest = true;
            self.pending.remove(&stream);
            self.outcomes.remove(&stream);
        }
    }

    /// Notes that it is sent.
    pub(super) fn rest_sent(&mut self) {
        if !std::mem::take(&mut self.has_rest) {
            return;
        }
        if self.pending.is_empty() && !self.is_amid {
            self.cut();
        } else {
            self.append(&entry(Kind::RestSent, 0, &[]));
            self.compact();
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
        if self.pending.remove(&stream).is_none() {
            return;
        }
        if self.pending.is_empty() && !self.is_amid && !self.has_rest {
            self.cut();
        } else {
            self.append(&entry(Kind::Answered, stream, &[]));
            self.compact();
        }
    }

    /// Notes whose connection it is.
    pub(super) fn identity(&mut self, identity: &Identity) {
        if let Some(file) = &self.file
            && let Err(error) = write_header(file, identity)
        {
            warn!(path = %self.path.display(), %error, "cannot note whose a connection is");
        }
    }

    /// Its file was removed by somebody else: what is in it goes into a new one of the same name.
    pub(super) fn write_again(&mut self) {
        let Some(file) = &self.file else { return };
        let copy = || -> io::Result<File> {
            let mut bytes = vec![0; usize::try_from(self.length).unwrap_or_default()];
            file.read_exact_at(&mut bytes, 0)?;
            let draft = self.path.with_extension("draft");
            let again = new_file(&draft)?;
            again.write_all_at(&bytes, 0)?;
            fs::rename(&draft, &self.path)?;
            Ok(again)
        };
        match copy() {
            Ok(again) => self.file = Some(again),
            Err(error) => {
                warn!(path = %self.path.display(), %error, "requests of a connection will not survive us");
            }
        }
    }

    /// What a journal of the first format said, as one of this format in its place.
    fn written_again(path: &Path, recovered: &Recovered) -> io::Result<Self> {
        let draft = path.with_extension("draft");
        let file = new_file(&draft)?;
        write_header(&file, &recovered.identity)?;
        let mut journal = Self::new(path.to_owned(), Some(file), HEADER);
        if !recovered.rest.is_empty() {
            journal.rest(&recovered.rest);
        }
        for &stream in &recovered.unreadable {
            journal.lost(stream);
        }
        // In order, so that the doubtful one, if there is, is the last entry.
        for (&stream, request) in &recovered.pending {
            journal.request(stream, request);
            if let Some(Some(outcome)) = recovered.outcomes.get(&stream) {
                journal.outcome(stream, outcome);
            }
        }
        let partial = &recovered.partial;
        if !partial.bytes.is_empty() {
            journal.part(&[], &partial.bytes);
        }
        if partial.skipped > 0 {
            journal.skipped(partial.skipped);
        }
        if !partial.bytes.is_empty() && !recovered.part_is_doubtful {
            journal.part_consumed();
        }
        fs::rename(&draft, path)?;
        Ok(journal)
    }

    /// The connection is over.
    pub(super) fn remove(self) {
        if self.file.is_some() {
            let _ = fs::remove_file(&self.path);
        }
    }

    /// Appends the entry of a request that is to be answered, and what comes with it.
    fn append_pending(&mut self, stream: u32, mut entry: Vec<u8>, and: &[u8]) {
        let place = (self.length, entry.len());
        entry.extend_from_slice(and);
        if self.append(&entry) {
            self.pending.insert(stream, place);
        }
    }

    fn append(&mut self, entries: &[u8]) -> bool {
        let Some(file) = &self.file else { return false };
        failpoint::step("before a request's fate is noted");
        let length = self.length.saturating_add(entries.len() as u64);
        let written = if length > LONGEST {
            Err(io::ErrorKind::FileTooLarge.into())
        } else {
            file.write_all_at(entries, self.length)
        };
        match written {
            Ok(()) => {
                failpoint::step("after a request's fate was noted");
                self.length = length;
                true
            }
            Err(error) => {
                warn!(path = %self.path.display(), %error, "a request will not survive us: it cannot be noted");
                let _ = file.set_len(self.length);
                false
            }
        }
    }

    fn cut(&mut self) {
        let is_cut = |file: &File| file.set_len(HEADER).is_ok();
        if self.length > HEADER && self.pending.is_empty() && self.file.as_ref().is_some_and(is_cut)
        {
            self.length = HEADER;
        }
    }

    /// Rewrites a long journal of mostly answered requests.
    fn compact(&mut self) {
        let needed: u64 = self.pending.values().map(|&(_, size)| size as u64).sum();
        let is_fixed = self.is_amid || self.has_rest || !self.outcomes.is_empty();
        if self.length < COMPACT_FROM || self.length / 4 < needed || is_fixed {
            return;
        }
        if let Err(error) = self.rewrite() {
            warn!(path = %self.path.display(), %error, "cannot shorten a journal");
        }
    }

    fn rewrite(&mut self) -> io::Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let draft = self.path.with_extension("draft");
        let shorter = new_file(&draft)?;
        let mut head = header(&Identity::default());
        file.read_exact_at(&mut head, 0)?;
        shorter.write_all_at(&head, 0)?;
        let mut length = HEADER;
        let mut pending = BTreeMap::new();
        for (&stream, &(at, size)) in &self.pending {
            let mut entry = vec![0; size];
            file.read_exact_at(&mut entry, at)?;
            shorter.write_all_at(&entry, length)?;
            pending.insert(stream, (length, size));
            length += size as u64;
        }
        fs::rename(&draft, &self.path)?;
        (self.file, self.length, self.pending) = (Some(shorter), length, pending);
        Ok(())
    }
}

fn new_file(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    write_header(&file, &Identity::default())?;
    Ok(file)
}

fn write_header(file: &File, identity: &Identity) -> io::Result<()> {
    file.write_all_at(&header(identity), 0)
}

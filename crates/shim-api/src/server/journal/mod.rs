//! [`Journal`]: what was read from one connection and is not answered yet, on disk, so that another daemon can answer it.
//! Owns the file, its format and its bounds; never looks into a request.
//!
//! A file begins with a header that holds the connection's namespace; entries follow, each with its length and a checksum. When
//! everything is answered, the file is cut back to the header, so it rarely outgrows its first page. Writes go to tmpfs: they take
//! microseconds and are not waited for elsewhere.

mod entry;
mod recovery;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use embedshim_core::failpoint;
use embedshim_core::id::Namespace;
use nix::sys::memfd::{MFdFlags, memfd_create};
use tracing::warn;

use self::entry::{HEADER, HEADER_SIZE, Kind, PREFIX, entry, header};
pub(super) use self::recovery::Recovered;

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
                (self.begin(connection), Recovered::default())
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
    memory.write_all_at(&header(None), 0)?;
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
        let at = self.length;
        if self.append(Kind::Request, stream, frame) {
            self.pending.insert(stream, (at, PREFIX + frame.len()));
        }
    }

    /// Notes a part of a frame, before it is consumed.
    pub(super) fn part(&mut self, bytes: &[u8]) {
        self.is_amid = true;
        self.append(Kind::Part, 0, bytes);
    }

    /// Notes so many bytes of a payload that is too long to be kept, before they are consumed.
    pub(super) fn skipped(&mut self, count: usize) {
        self.is_amid = true;
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        self.append(Kind::Skipped, 0, &count.to_le_bytes());
    }

    /// And after either of them.
    pub(super) fn part_consumed(&mut self) {
        self.append(Kind::PartConsumed, 0, &[]);
    }

    /// Notes a frame that came in parts, now that it is whole; its parts are not needed any more.
    pub(super) fn parts_are(&mut self, stream: u32, frame: &[u8]) {
        self.request(stream, frame);
        self.is_amid = false;
    }

    /// Notes that the parts made nothing that has to be answered.
    pub(super) fn parts_are_nothing(&mut self) {
        self.append(Kind::Request, 0, &[]);
        self.is_amid = false;
        self.cut();
    }

    /// Notes what is still to be sent of an answer.
    pub(super) fn rest(&mut self, bytes: &[u8]) {
        self.has_rest = true;
        self.append(Kind::Rest, 0, bytes);
    }

    /// Notes a refusal before it is sent, and with that its request as answered: who has been refused must not see it begin anew under
    /// our successor.
    pub(super) fn refused(&mut self, stream: u32, answer: &[u8]) {
        if self.pending.contains_key(&stream) && self.append(Kind::Rest, stream, answer) {
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
            self.append(Kind::RestSent, 0, &[]);
            self.compact();
        }
    }

    /// Notes what this stream's request will be answered.
    pub(super) fn outcome(&mut self, stream: u32, answer: &[u8]) {
        if self.pending.contains_key(&stream) {
            self.append(Kind::Outcome, stream, answer);
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
            self.append(Kind::Answered, stream, &[]);
            self.compact();
        }
    }

    /// Notes the namespace that the connection's calls are in.
    pub(super) fn namespace(&mut self, namespace: &Namespace) {
        if let Some(file) = &self.file
            && let Err(error) = file.write_all_at(&header(Some(namespace)), 0)
        {
            warn!(path = %self.path.display(), %error, "cannot note a connection's namespace");
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

    /// The connection is over.
    pub(super) fn remove(self) {
        if self.file.is_some() {
            let _ = fs::remove_file(&self.path);
        }
    }

    fn append(&mut self, kind: Kind, stream: u32, payload: &[u8]) -> bool {
        let Some(file) = &self.file else { return false };
        failpoint::step("before a request's fate is noted");
        let entry = entry(kind, stream, payload);
        let length = self.length.saturating_add(entry.len() as u64);
        let written = if length > LONGEST {
            Err(io::ErrorKind::FileTooLarge.into())
        } else {
            file.write_all_at(&entry, self.length)
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
        let mut head = [0; HEADER_SIZE];
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
    file.write_all_at(&header(None), 0)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journals() -> (tempfile::TempDir, Journals) {
        let directory = tempfile::tempdir().unwrap();
        let journals = Journals::open(directory.path().join("connections")).unwrap();
        (directory, journals)
    }

    #[test]
    fn a_connection_that_comes_while_the_directory_is_gone_is_noted_when_it_is_back() {
        let (directory, journals) = journals();
        fs::remove_dir_all(directory.path()).unwrap();
        let mut journal = journals.begin(7);
        journal.request(1, b"asked meanwhile");
        journals.make().unwrap();
        journal.write_again();
        journal.request(3, b"asked afterwards");
        drop(journal);
        let (_, recovered) = journals.resume(7);
        let streams: Vec<u32> = recovered.pending.keys().copied().collect();
        assert_eq!(streams, [1, 3]);
    }

    #[test]
    fn what_is_not_answered_comes_back() {
        let (_directory, journals) = journals();
        let mut journal = journals.begin(7);
        journal.namespace(&"k8s.io".parse().unwrap());
        journal.request(1, b"one");
        journal.request(3, b"three");
        journal.answered(1);
        journal.request(5, b"five");
        drop(journal);
        let (mut journal, recovered) = journals.resume(7);
        assert_eq!(recovered.namespace, Some("k8s.io".parse().unwrap()));
        let pending: Vec<_> = recovered.pending.into_iter().collect();
        assert_eq!(pending, [(3, b"three".to_vec()), (5, b"five".to_vec())]);
        assert_eq!(recovered.doubtful, Some(5));
        journal.answered(3);
        journal.answered(5);
        assert_eq!(fs::metadata(&journal.path).unwrap().len(), HEADER);
        let (_, recovered) = journals.resume(7);
        assert!(recovered.pending.is_empty() && recovered.namespace.is_some());
    }

    #[test]
    fn a_refusal_comes_back_and_its_request_does_not() {
        let (_directory, journals) = journals();
        let mut journal = journals.begin(7);
        journal.request(1, b"one");
        journal.request(3, b"three");
        journal.refused(3, b"no");
        let (mut journal, owed) = journals.resume(7);
        assert_eq!(owed.rest, b"no");
        assert_eq!(owed.pending.into_keys().collect::<Vec<_>>(), [1]);
        journal.rest_sent();
        let (mut journal, owed) = journals.resume(7);
        assert!(owed.rest.is_empty() && owed.pending.len() == 1);
        journal.refused(1, b"no");
        journal.rest_sent();
        journal.answered(1);
        assert_eq!(journal.length, HEADER, "nothing is owed any more");
    }

    #[test]
    fn what_a_deletion_was_about_to_answer_comes_back() {
        let (_directory, journals) = journals();
        let mut journal = journals.begin(7);
        journal.request(1, b"wait");
        journal.request(3, b"delete");
        journal.outcome(3, b"code 9");
        let (mut journal, recovered) = journals.resume(7);
        assert_eq!(recovered.outcomes.get(&3), Some(&b"code 9".to_vec()));
        journal.answered(3);
        let (_, recovered) = journals.resume(7);
        assert!(recovered.outcomes.is_empty() && recovered.pending.contains_key(&1));
    }

    #[test]
    fn a_long_journal_is_shortened_and_loses_nothing() {
        let (_directory, journals) = journals();
        let mut journal = journals.begin(1);
        journal.request(1, b"a Wait that takes for ever");
        for stream in (3..20_000).step_by(2) {
            journal.request(stream, &[b'x'; 100]);
            journal.answered(stream);
        }
        assert!(journal.length < 2 * COMPACT_FROM, "{}", journal.length);
        let (_, recovered) = journals.resume(1);
        let streams: Vec<u32> = recovered.pending.into_keys().collect();
        assert_eq!(streams, [1]);
    }

    #[test]
    fn a_damaged_request_is_lost_alone_and_by_name() {
        let (_directory, journals) = journals();
        let mut journal = journals.begin(1);
        for stream in [1, 3, 5] {
            journal.request(stream, b"payload");
        }
        let path = journal.path.clone();
        let middle = HEADER + 20 + 15;
        let mut bytes = fs::read(&path).unwrap();
        bytes[usize::try_from(middle).unwrap()] ^= 0xff;
        fs::write(&path, bytes).unwrap();
        let (_, recovered) = journals.resume(1);
        assert_eq!(recovered.unreadable, [3]);
        let streams: Vec<u32> = recovered.pending.into_keys().collect();
        assert_eq!(streams, [1, 5]);
    }

    #[test]
    fn any_piece_of_a_journal_can_be_read() {
        let (_directory, journals) = journals();
        let mut journal = journals.begin(1);
        journal.request(1, b"whole");
        journal.part(b"half");
        journal.part_consumed();
        journal.rest(b"of an answer");
        let bytes = fs::read(&journal.path).unwrap();
        for length in 0..=bytes.len() {
            fs::write(&journal.path, &bytes[..length]).unwrap();
            let (after, recovered) = journals.resume(1);
            assert!(recovered.pending.len() <= 1);
            drop(after);
            let (_, again) = journals.resume(1);
            assert_eq!(again.pending, recovered.pending, "{length} bytes");
        }
    }
}

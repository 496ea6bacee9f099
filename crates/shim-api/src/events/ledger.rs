//! [`Ledger`]: the unacknowledged events for one containerd on disk, so that another daemon can
//! send them. Owns the file and its length; never sends, and never looks into an event.
//!
//! Events are appended; the header says where the first unacknowledged one begins. When everything
//! is acknowledged, the file is removed: there is one for each containerd that has not heard all.
//! Writes go to tmpfs: they take microseconds and are done in place.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use embedshim_core::failpoint;
use tracing::{info, warn};

use super::entry::{self, Contents, FIRST_AT, HEADER, entry, file_name, header};

/// A file with more than this in it that is acknowledged, and more than what is not, is rewritten.
const COMPACT_FROM: u64 = 64 * 1024;
/// More than any file of ours has: an outbox holds 16 MiB, and as much may be acknowledged and not
/// cut off yet.
const LONGEST: u64 = 64 << 20;
/// A file that is being written, and one that cannot be read.
const DRAFT: &str = "draft";
const DAMAGED: &str = "damaged";

#[derive(Debug)]
pub(super) struct Ledger {
    path: PathBuf,
    address: String,
    /// None while there is nothing to note, and when the file cannot be made.
    file: Option<File>,
    /// Where the first unacknowledged entry begins, and what the file says of that.
    first: u64,
    noted: u64,
    end: u64,
    /// An attempt to rewrite has failed: wait until so much is acknowledged.
    patience: u64,
    is_failing: bool,
}

/// An event as a predecessor left it: what to acknowledge it with, and itself.
pub(super) type Left = (u64, Vec<u8>);

impl Ledger {
    /// For an address of which there is no file.
    pub(super) fn new(directory: &Path, address: &str) -> Self {
        Self::with(directory.join(file_name(address)), address, None)
    }

    fn with(path: PathBuf, address: &str, file: Option<File>) -> Self {
        Self {
            path,
            address: address.to_owned(),
            file,
            first: HEADER,
            noted: HEADER,
            end: HEADER,
            patience: 0,
            is_failing: false,
        }
    }

    /// What predecessors left in a directory. What cannot be read is set aside; of whom there is
    /// nothing to tell, nothing stays.
    pub(super) fn all(directory: &Path) -> io::Result<Vec<(Self, Vec<Left>)>> {
        let mut all = Vec::new();
        for found in fs::read_dir(directory)?.flatten() {
            let path = found.path();
            let is_file = found.file_type().is_ok_and(|kind| kind.is_file());
            if !is_file || path.extension().is_some_and(|kind| kind == DAMAGED) {
                continue;
            }
            if path.extension().is_some_and(|kind| kind == DRAFT) {
                let _ = fs::remove_file(&path);
                continue;
            }
            match Self::resume(&path) {
                // What is shorter than its header was never begun.
                _ if found.metadata().is_ok_and(|file| file.len() < HEADER) => {
                    drop(fs::remove_file(&path));
                }
                Ok((_, events)) if events.is_empty() => drop(fs::remove_file(&path)),
                Ok(resumed) => all.push(resumed),
                Err(error) => {
                    warn!(path = %path.display(), %error, "events for containerd cannot be read: the file is set aside");
                    let _ = fs::rename(&path, path.with_extension(DAMAGED));
                }
            }
        }
        Ok(all)
    }

    fn resume(path: &Path) -> io::Result<(Self, Vec<Left>)> {
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let length = file.metadata()?.len();
        if length > LONGEST {
            return Err(invalid(format!("{length} bytes")));
        }
        let contents = Contents::read(&fs::read(path)?)
            .ok_or_else(|| invalid("not an outbox of this version".into()))?;
        if path.file_name() != Some(file_name(&contents.address).as_ref()) {
            return Err(invalid(format!("of {:?}", contents.address)));
        }
        if contents.lost > 0 {
            // A daemon that dies within a write leaves a piece of an entry; what it was about has
            // not become true then.
            warn!(
                address = contents.address,
                bytes = contents.lost,
                "a part of the events for containerd is damaged and lost"
            );
        }
        let mut ledger = Self::with(path.to_owned(), &contents.address, Some(file));
        let spans: u64 = contents.events.iter().map(|(span, _)| span).sum();
        ledger.first = contents.first;
        // Whatever the file says, say it anew.
        ledger.noted = 0;
        ledger.end = contents.first.saturating_add(spans);
        if let Some(file) = &ledger.file {
            file.set_len(ledger.end)?;
        }
        ledger.note()?;
        Ok((ledger, contents.events))
    }

    /// Notes an event, and returns what to acknowledge it with: nothing if it could not be noted.
    pub(super) fn append(&mut self, event: &[u8]) -> u64 {
        match self.try_append(event) {
            Ok(span) => {
                if std::mem::take(&mut self.is_failing) {
                    info!(address = self.address, "events will survive us again");
                }
                span
            }
            Err(error) => {
                self.complain(&error, "events for containerd will not survive us");
                0
            }
        }
    }

    fn try_append(&mut self, event: &[u8]) -> io::Result<u64> {
        if self.file.is_none() {
            self.file = Some(new_file(&self.path, &self.address)?);
            (self.first, self.noted, self.end) = (HEADER, HEADER, HEADER);
        }
        if self.noted != self.first {
            self.note()?;
        }
        let Some(file) = &self.file else { return Ok(0) };
        let entry = entry(event);
        failpoint::step("event to be appended");
        if let Err(error) = file.write_all_at(&entry, self.end) {
            let _ = file.set_len(self.end);
            return Err(error);
        }
        failpoint::step("event appended");
        let span = entry.len() as u64;
        self.end = self.end.saturating_add(span);
        Ok(span)
    }

    /// Forgets its file if that is not at its path any more: what is appended from now on begins
    /// another one. True if it has.
    pub(super) fn begin_again_if_removed(&mut self) -> bool {
        let ours = self.file.as_ref().and_then(|file| file.metadata().ok());
        let there = self.path.symlink_metadata().ok();
        let id = |file: &fs::Metadata| (file.dev(), file.ino());
        if ours.is_none() || ours.as_ref().map(id) == there.as_ref().map(id) {
            return false;
        }
        self.file = None;
        true
    }

    /// Notes that the first event needs not be sent any more.
    pub(super) fn acknowledge(&mut self, span: u64) {
        if span == 0 {
            return;
        }
        self.first = self.first.saturating_add(span).min(self.end);
        failpoint::step("acknowledgement to be noted");
        if let Err(error) = self.cut().and_then(|()| self.note()) {
            self.complain(&error, "events that containerd has may be sent again");
        }
        failpoint::step("acknowledgement noted");
        self.compact();
    }

    /// Removes the file when nothing of it is needed, which acknowledges everything: of a
    /// containerd that we have nothing for, there is neither a file nor a descriptor. The next
    /// event begins another one.
    fn cut(&mut self) -> io::Result<()> {
        if self.file.is_some() && self.first == self.end {
            match fs::remove_file(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            self.file = None;
            (self.first, self.noted, self.end) = (HEADER, HEADER, HEADER);
        }
        Ok(())
    }

    fn note(&mut self) -> io::Result<()> {
        if let Some(file) = &self.file
            && self.noted != self.first
        {
            file.write_all_at(&entry::first_field(self.first), FIRST_AT)?;
            self.noted = self.first;
        }
        Ok(())
    }

    fn compact(&mut self) {
        let acknowledged = self.first.saturating_sub(HEADER);
        let needed = self.end.saturating_sub(self.first);
        if acknowledged < COMPACT_FROM.max(needed).max(self.patience) {
            return;
        }
        match self.rewrite() {
            Ok(()) => self.patience = 0,
            Err(error) => {
                self.patience = acknowledged.saturating_mul(2);
                warn!(path = %self.path.display(), %error, "cannot shorten an outbox");
            }
        }
    }

    fn rewrite(&mut self) -> io::Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let needed = self.end.saturating_sub(self.first);
        let mut entries = vec![0; usize::try_from(needed).unwrap_or_default()];
        file.read_exact_at(&mut entries, self.first)?;
        let draft = self.path.with_extension(DRAFT);
        let shorter = new_file(&draft, &self.address)?;
        shorter.write_all_at(&entries, HEADER)?;
        fs::rename(&draft, &self.path)?;
        self.file = Some(shorter);
        (self.first, self.noted) = (HEADER, HEADER);
        self.end = HEADER.saturating_add(needed);
        Ok(())
    }

    /// Once for each outage.
    fn complain(&mut self, error: &io::Error, what: &str) {
        if !std::mem::replace(&mut self.is_failing, true) {
            warn!(path = %self.path.display(), address = self.address, %error, "{what}: they cannot be noted");
        }
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }
}

fn new_file(path: &Path, address: &str) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all_at(&header(address, HEADER), 0)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(directory: &Path) -> Vec<Vec<u8>> {
        let all = Ledger::all(directory).unwrap();
        all.into_iter()
            .flat_map(|(_, left)| left)
            .map(|(_, event)| event)
            .collect()
    }

    #[test]
    fn what_is_not_acknowledged_comes_back_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::new(directory.path(), "/run/a.sock");
        let spans: Vec<u64> = [b"one", b"two", b"six"]
            .iter()
            .map(|event| ledger.append(*event))
            .collect();
        ledger.acknowledge(spans[0]);
        drop(ledger);
        assert_eq!(left(directory.path()), [b"two", b"six"]);
        let (mut ledger, _) = Ledger::all(directory.path()).unwrap().remove(0);
        let span = ledger.append(b"ten");
        ledger.acknowledge(spans[1]);
        ledger.acknowledge(spans[2]);
        assert_eq!(left(directory.path()), [b"ten"]);
        ledger.acknowledge(span);
        assert!(ledger.file.is_none(), "an idle outbox holds a descriptor");
        assert!(!ledger.path.exists(), "an empty outbox stays");
        let span = ledger.append(b"eve");
        assert_eq!(left(directory.path()), [b"eve"]);
        ledger.acknowledge(span);
        assert!(!ledger.path.exists(), "an empty outbox stays");
    }

    #[test]
    fn a_file_that_was_cut_is_empty_whatever_its_header_says() {
        let directory = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::new(directory.path(), "/a");
        let span = ledger.append(b"one");
        ledger.append(b"two");
        ledger.acknowledge(span);
        // A daemon that dies between the cut and its note.
        ledger.file.as_ref().unwrap().set_len(HEADER).unwrap();
        assert!(left(directory.path()).is_empty());
    }

    #[test]
    fn a_long_ledger_is_shortened_and_loses_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::new(directory.path(), "/a");
        let mut spans = std::collections::VecDeque::new();
        for number in 0..20_000u32 {
            spans.push_back(ledger.append(&[&number.to_le_bytes()[..], &[b'x'; 100]].concat()));
            if spans.len() > 10 {
                ledger.acknowledge(spans.pop_front().unwrap());
            }
        }
        assert!(ledger.end < 2 * COMPACT_FROM, "{}", ledger.end);
        let first = left(directory.path()).first().unwrap()[..4].to_vec();
        assert_eq!(left(directory.path()).len(), 10);
        assert_eq!(first, 19_990u32.to_le_bytes());
    }

    #[test]
    fn any_piece_of_a_file_can_be_opened_and_gone_on_with() {
        let directory = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::new(directory.path(), "/a");
        for event in [b"one", b"two"] {
            ledger.append(event);
        }
        let bytes = fs::read(&ledger.path).unwrap();
        for length in 0..=bytes.len() {
            fs::write(&ledger.path, &bytes[..length]).unwrap();
            let before = left(directory.path());
            if let Some((mut ledger, _)) = Ledger::all(directory.path()).unwrap().pop() {
                ledger.append(b"new");
                let after = left(directory.path());
                assert_eq!(after, [before, vec![b"new".to_vec()]].concat(), "{length}");
            }
        }
    }

    #[test]
    fn what_is_no_outbox_is_set_aside_and_another_ones_is_not_taken_for_it() {
        let directory = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::new(directory.path(), "/a");
        ledger.append(b"one");
        fs::rename(&ledger.path, directory.path().join(file_name("/b"))).unwrap();
        fs::write(directory.path().join("garbage"), [b'x'; 1000]).unwrap();
        fs::write(directory.path().join("short"), "x").unwrap();
        fs::write(directory.path().join("2f61.draft"), "x").unwrap();
        fs::create_dir(directory.path().join("directory")).unwrap();
        assert!(left(directory.path()).is_empty());
        let mut names: Vec<_> = fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["2f62.damaged", "directory", "garbage.damaged"]);
    }

    /// The bytes that version 0.1.0 wrote for these events: a successor of any version reads them.
    const OF_0_1_0: &[u8] = include_bytes!("../appendlog/fixtures/events.embevnt1");

    #[test]
    fn the_bytes_of_an_outbox_are_those_of_version_0_1_0() {
        let directory = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::new(directory.path(), "/run/a.sock");
        let span = ledger.append(b"one");
        ledger.append(b"two");
        ledger.append(b"three");
        ledger.acknowledge(span);
        assert_eq!(fs::read(&ledger.path).unwrap(), OF_0_1_0);
    }
}

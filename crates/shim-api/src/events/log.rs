//! [`EventLog`]: the unacknowledged events for one containerd, on disk, so that another daemon can
//! send them. Owns which of them are needed still; the file is a [`Log`]'s. Never sends, and never
//! looks into an event.
//!
//! The header says where the first unacknowledged event begins. When everything is acknowledged,
//! the file is removed: there is one for each containerd that has not taken all its events.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use embedshim_core::failpoint;
use tracing::{info, warn};

use super::format::{Contents, FIRST_AT, HEADER, file_name, first_field, header};
use crate::appendlog::{Found, Log, Marked, discard_drafts, is_log, set_aside};

/// The unacknowledged events for one containerd.
#[derive(Debug)]
pub(super) struct EventLog {
    path: PathBuf,
    address: String,
    /// None while there is nothing to note, and when not even memory can be had.
    log: Option<Log>,
    /// Where the first unacknowledged entry begins.
    first: u64,
    /// Where it begins, as the header says.
    noted_first: u64,
    /// A failure was logged, and no event was durable since.
    is_failing: bool,
}

/// An event as a predecessor left it: what to acknowledge it with, and itself.
pub(super) type StoredEvent = (u64, Vec<u8>);

impl EventLog {
    /// The log for an address that has no file.
    pub(super) fn new(directory: &Path, address: &str) -> Self {
        Self {
            path: directory.join(file_name(address)),
            address: address.to_owned(),
            log: None,
            first: HEADER,
            noted_first: HEADER,
            is_failing: false,
        }
    }

    /// The logs that predecessors left in a directory. One that cannot be read is set aside; one
    /// without events is removed.
    pub(super) fn all(directory: &Path) -> io::Result<Vec<(Self, Vec<StoredEvent>)>> {
        discard_drafts(directory)?;
        let mut all = Vec::new();
        for found in fs::read_dir(directory)?.flatten() {
            let path = found.path();
            let Ok(metadata) = found.metadata() else {
                continue;
            };
            if !metadata.is_file() || !is_log(&path) {
                continue;
            }
            if metadata.len() < HEADER {
                // Its writer was killed before there was an event in it.
                let _ = fs::remove_file(&path);
                continue;
            }
            match Self::resume(&path) {
                Ok((_, events)) if events.is_empty() => drop(fs::remove_file(&path)),
                Ok(resumed) => all.push(resumed),
                Err(error) => {
                    warn!(path = %path.display(), %error, "events: cannot read the event log: it is renamed to *.damaged, and its events are lost");
                    let _ = set_aside(&path);
                }
            }
        }
        Ok(all)
    }

    fn resume(path: &Path) -> io::Result<(Self, Vec<StoredEvent>)> {
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let found = Found::read(path)?;
        let contents = Contents::read(found.bytes())
            .ok_or_else(|| invalid("not an outbox of this version".into()))?;
        if path.file_name() != Some(file_name(&contents.address).as_ref()) {
            return Err(invalid(format!(
                "its name is not that of {:?}",
                contents.address
            )));
        }
        if contents.lost > 0 {
            // A daemon that dies within a write leaves a piece of an entry; the change that it was
            // about is not on disk then.
            warn!(
                address = contents.address,
                bytes = contents.lost,
                "events: the event log is damaged: a part of the events is lost"
            );
        }
        let mut log = Self {
            path: path.to_owned(),
            address: contents.address,
            log: Some(found.go_on(HEADER, contents.end)?),
            first: contents.first,
            // Whatever the header says, it is written again.
            noted_first: 0,
            is_failing: false,
        };
        log.note_first()?;
        Ok((log, contents.events))
    }

    /// Notes an event, and returns what to acknowledge it with: 0 if it could not be noted.
    pub(super) fn append(&mut self, event: &[u8]) -> u64 {
        match self.try_append(event) {
            Ok(span) => span,
            Err(error) => {
                self.warn(
                    &error,
                    "events: not durable: cannot write them to the event log",
                );
                0
            }
        }
    }

    fn try_append(&mut self, event: &[u8]) -> io::Result<u64> {
        if self.log.is_none() {
            self.log = Some(self.begin()?);
            (self.first, self.noted_first) = (HEADER, HEADER);
        }
        self.note_first()?;
        let Some(log) = &mut self.log else {
            return Ok(0);
        };
        let place = log.append(&Marked::entry(event))?;
        if !log.is_in_memory() && std::mem::take(&mut self.is_failing) {
            info!(address = self.address, "events: durable again");
        }
        Ok(place.end.saturating_sub(place.start))
    }

    /// A new log, in memory if it has to be.
    fn begin(&mut self) -> io::Result<Log> {
        let header = header(&self.address, HEADER);
        Log::create(&self.path, &header).or_else(|error| {
            self.warn(&error, "events: not durable: cannot create the event log");
            Log::in_memory(&self.path, &header)
        })
    }

    /// Creates the file again if it was removed.
    pub(super) fn recreate(&mut self) {
        if let Some(log) = &mut self.log
            && let Err(error) = log.recreate()
        {
            self.warn(
                &error,
                "events: not durable: cannot create the event log again",
            );
        }
    }

    /// Notes that the first event, which takes so many bytes, needs not be sent any more.
    pub(super) fn acknowledge(&mut self, span: u64) {
        let Some(log) = self.log.as_ref().filter(|_| span > 0) else {
            return;
        };
        self.first = self.first.saturating_add(span).min(log.end());
        failpoint::step("before an acknowledgement is noted");
        if let Err(error) = self
            .remove_if_acknowledged()
            .and_then(|()| self.note_first())
        {
            self.warn(
                &error,
                "events: may be sent again: cannot note in the event log that containerd has them",
            );
        }
        failpoint::step("after an acknowledgement was noted");
        self.compact();
    }

    /// Removes the file when nothing of it is needed, which acknowledges everything: a containerd
    /// that has all its events costs neither a file nor a descriptor. The next event begins another
    /// file.
    fn remove_if_acknowledged(&mut self) -> io::Result<()> {
        if let Some(log) = self.log.take_if(|log| log.end() == self.first)
            && let Err(error) = log.remove()
        {
            self.log = Some(log);
            return Err(error);
        }
        Ok(())
    }

    fn note_first(&mut self) -> io::Result<()> {
        if let Some(log) = &self.log
            && self.noted_first != self.first
        {
            log.write_header(FIRST_AT, &first_field(self.first))?;
            self.noted_first = self.first;
        }
        Ok(())
    }

    fn compact(&mut self) {
        let Some(log) = &mut self.log else { return };
        let needed = self.first..log.end();
        if !log.is_worth_compacting(needed.end.saturating_sub(needed.start)) {
            return;
        }
        match log.compact(&header(&self.address, HEADER), &[needed]) {
            Ok(_) => (self.first, self.noted_first) = (HEADER, HEADER),
            Err(error) => {
                warn!(path = %self.path.display(), %error, "events: cannot compact the event log");
            }
        }
    }

    /// Warns once for each outage.
    fn warn(&mut self, error: &io::Error, what: &str) {
        if !std::mem::replace(&mut self.is_failing, true) {
            warn!(address = self.address, path = %self.path.display(), %error, "{what}");
        }
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::appendlog::Framing;
    use crate::appendlog::tests::{User, log_properties};

    /// An outbox as a log: each payload is an event.
    struct Events;

    impl User for Events {
        const HEADER: usize = 160;
        const PREFIX: usize = Marked::PREFIX;
        const MAGIC_AT: &'static [usize] = &[0];

        fn append(directory: &Path, payloads: &[Vec<u8>]) -> PathBuf {
            let stored = EventLog::all(directory).unwrap().pop();
            let (mut log, _) = stored.unwrap_or_else(|| (EventLog::new(directory, "/a"), vec![]));
            for payload in payloads {
                log.append(payload);
            }
            log.path
        }

        fn read(directory: &Path) -> Vec<Vec<u8>> {
            left(directory)
        }
    }

    log_properties!(super::Events);

    fn left(directory: &Path) -> Vec<Vec<u8>> {
        let all = EventLog::all(directory).unwrap();
        all.into_iter()
            .flat_map(|(_, left)| left)
            .map(|(_, event)| event)
            .collect()
    }

    #[test]
    fn what_is_not_acknowledged_comes_back_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = EventLog::new(directory.path(), "/run/a.sock");
        let spans: Vec<u64> = [b"one", b"two", b"six"]
            .iter()
            .map(|event| log.append(*event))
            .collect();
        log.acknowledge(spans[0]);
        drop(log);
        assert_eq!(left(directory.path()), [b"two", b"six"]);
        let (mut log, _) = EventLog::all(directory.path()).unwrap().remove(0);
        let span = log.append(b"ten");
        log.acknowledge(spans[1]);
        log.acknowledge(spans[2]);
        assert_eq!(left(directory.path()), [b"ten"]);
        log.acknowledge(span);
        assert!(log.log.is_none(), "an idle outbox holds a descriptor");
        assert!(!log.path.exists(), "an empty outbox stays");
        let span = log.append(b"eve");
        assert_eq!(left(directory.path()), [b"eve"]);
        log.acknowledge(span);
        assert!(!log.path.exists(), "an empty outbox stays");
    }

    #[test]
    fn a_file_that_was_cut_is_empty_whatever_its_header_says() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = EventLog::new(directory.path(), "/a");
        let span = log.append(b"one");
        log.append(b"two");
        log.acknowledge(span);
        // A daemon that dies between the cut and its note.
        fs::File::options()
            .write(true)
            .open(&log.path)
            .unwrap()
            .set_len(HEADER)
            .unwrap();
        assert!(left(directory.path()).is_empty());
    }

    #[test]
    fn a_long_log_is_shortened_and_loses_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = EventLog::new(directory.path(), "/a");
        let mut spans = std::collections::VecDeque::new();
        for number in 0..20_000u32 {
            spans.push_back(log.append(&[&number.to_le_bytes()[..], &[b'x'; 100]].concat()));
            if spans.len() > 10 {
                log.acknowledge(spans.pop_front().unwrap());
            }
        }
        let end = log.log.as_ref().unwrap().end();
        assert!(end < 128 * 1024, "{end}");
        let first = left(directory.path()).first().unwrap()[..4].to_vec();
        assert_eq!(left(directory.path()).len(), 10);
        assert_eq!(first, 19_990u32.to_le_bytes());
    }

    #[test]
    fn what_is_no_outbox_is_set_aside_and_another_ones_is_not_taken_for_it() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = EventLog::new(directory.path(), "/a");
        log.append(b"one");
        fs::rename(&log.path, directory.path().join(file_name("/b"))).unwrap();
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
        let mut log = EventLog::new(directory.path(), "/run/a.sock");
        let span = log.append(b"one");
        log.append(b"two");
        log.append(b"three");
        log.acknowledge(span);
        assert_eq!(fs::read(&log.path).unwrap(), OF_0_1_0);
    }

    #[test]
    fn an_outbox_of_version_0_1_0_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(file_name("/run/a.sock"));
        fs::write(&path, OF_0_1_0).unwrap();
        assert_eq!(left(directory.path()), [b"two".to_vec(), b"three".to_vec()]);
        assert_eq!(fs::read(&path).unwrap(), OF_0_1_0);
    }

    #[test]
    fn an_event_that_comes_while_the_directory_is_gone_is_noted_when_it_is_back() {
        let directory = tempfile::tempdir().unwrap();
        let events = directory.path().join("events");
        let mut log = EventLog::new(&events, "/a");
        log.append(b"one");
        fs::create_dir(&events).unwrap();
        log.recreate();
        log.append(b"two");
        assert_eq!(left(&events), [b"one", b"two"]);
    }
}

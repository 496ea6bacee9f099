//! [`StoreUsage`]: what the descriptor store of the service manager holds for this daemon. Owns the
//! limits: nothing is stored that could not be handed to a successor. Owns also the daemon's
//! duplicates of what is stored, with which it can take the place of a keeper that has ended.

use std::collections::HashMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use embedshim_core::fdstore::{FdName, InheritedFds};
use tracing::warn;

use super::activation::MAX_NAMES_LENGTH;
use crate::limits::{Count, OpenFiles};

/// Descriptors that are left for requests in flight and for the start of a successor.
const RESERVE: u64 = 32;

/// Why a descriptor cannot be stored.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreFull {
    #[error(
        "the descriptor store is full: it holds {total} of {limit}; raise FileDescriptorStoreMax= \
         of the unit, or without systemd the limit of open files"
    )]
    Limit { total: usize, limit: usize },
    #[error(
        "the descriptor store is full: the names of {total} descriptors fill the longest string \
         that a process can be given"
    )]
    Names { total: usize },
    #[error(
        "{open} of {limit} files are open, and a successor needs as many; raise the limit of open \
         files (RLIMIT_NOFILE, LimitNOFILE=)"
    )]
    OpenFiles { open: u64, limit: u64 },
}

/// The names and the number of the descriptors in the store.
#[derive(Debug, Default)]
pub(super) struct StoreUsage {
    counts: HashMap<FdName, usize>,
    /// Duplicates of all stored descriptors, to become their keeper with; `None` where systemd is
    /// the service manager, or where too few files may be open.
    duplicates: Option<HashMap<FdName, Vec<OwnedFd>>>,
    /// This process is about to become the keeper: it closes no duplicate to save descriptors.
    is_successor: bool,
    total: usize,
    /// The length of all names with a colon after each, a name for each descriptor.
    names_length: usize,
    /// The most descriptors that the service manager stores, if it says so.
    limit: Option<usize>,
    open_files: OpenFiles,
}

impl StoreUsage {
    /// An empty store of at most `limit` descriptors. With `duplicates`, all that is stored is held
    /// by this process as well.
    pub(super) fn new(limit: Option<usize>, duplicates: bool) -> Self {
        Self {
            limit,
            duplicates: duplicates.then(HashMap::new),
            ..Self::default()
        }
    }

    /// How many descriptors are stored, and how many at most, if that is known.
    pub(super) fn stored(&self) -> (usize, Option<usize>) {
        (self.total, self.limit)
    }

    /// Counts what a predecessor has stored, and duplicates it if this process holds duplicates.
    pub(super) fn take_over(&mut self, inherited: &InheritedFds) -> io::Result<()> {
        let total = inherited.counts().map(|(_, count)| count).sum();
        self.check_duplicates(total);
        for (name, descriptors) in inherited.iter() {
            let duplicates = match &self.duplicates {
                Some(_) => descriptors
                    .iter()
                    .map(OwnedFd::try_clone)
                    .collect::<io::Result<_>>()?,
                None => Vec::new(),
            };
            self.add(name, descriptors.len(), duplicates);
        }
        Ok(())
    }

    /// Refuses `count` more descriptors of this name if a successor could not be given them.
    pub(super) fn check_room(&mut self, name: &FdName, count: usize) -> Result<(), StoreFull> {
        let total = self.total;
        if let Some(limit) = self.limit
            && total + count > limit
        {
            return Err(StoreFull::Limit { total, limit });
        }
        if self.names_length + count * name_length(name) > MAX_NAMES_LENGTH {
            return Err(StoreFull::Names { total });
        }
        let is_the_daemons = matches!(
            name,
            FdName::Listener | FdName::SandboxListener | FdName::Intake | FdName::IntakeSender
        );
        if !is_the_daemons
            && let Some(Count { open, limit }) = self.open_files.exceeding(RESERVE, |limit| limit)
        {
            return Err(StoreFull::OpenFiles { open, limit });
        }
        Ok(())
    }

    /// Duplicates descriptors that are about to be stored; none if this process holds none.
    pub(super) fn duplicate(&mut self, descriptors: &[BorrowedFd<'_>]) -> io::Result<Vec<OwnedFd>> {
        self.check_duplicates(descriptors.len());
        if self.duplicates.is_none() {
            return Ok(Vec::new());
        }
        let duplicates = descriptors.iter().map(BorrowedFd::try_clone_to_owned);
        duplicates.collect()
    }

    /// Closes all duplicates where `more` of them leave too few files for requests, which need them
    /// more.
    fn check_duplicates(&mut self, more: usize) {
        if self.duplicates.is_none() || self.is_successor {
            return;
        }
        let more = u64::try_from(more).unwrap_or(u64::MAX);
        if let Some(Count { open, limit }) = self.open_files.exceeding(more, |limit| limit / 2) {
            warn!(
                open,
                limit,
                "cannot take the keeper's place from now on: half of the files that may be open \
                 are; raise the limit of open files (RLIMIT_NOFILE)"
            );
            self.duplicates = None;
        }
    }

    /// Counts descriptors that were stored, and takes their duplicates.
    pub(super) fn add(&mut self, name: FdName, count: usize, duplicates: Vec<OwnedFd>) {
        if let Some(all) = &mut self.duplicates {
            all.entry(name).or_default().extend(duplicates);
        }
        *self.counts.entry(name).or_default() += count;
        self.total += count;
        self.names_length += count * name_length(&name);
    }

    /// Counts off everything under a name, and closes the duplicates.
    pub(super) fn remove(&mut self, name: &FdName) {
        if let Some(all) = &mut self.duplicates {
            all.remove(name);
        }
        let count = self.counts.remove(name).unwrap_or(0);
        self.total -= count;
        self.names_length -= count * name_length(name);
    }

    /// Keeps all duplicates from now on, whatever the limit. False if this process has none.
    pub(super) fn begin_succession(&mut self) -> bool {
        self.is_successor = true;
        self.duplicates.is_some()
    }

    /// All duplicates, by name; afterwards this process holds none.
    pub(super) fn take_duplicates(&mut self) -> HashMap<FdName, Vec<OwnedFd>> {
        self.duplicates.take().unwrap_or_default()
    }
}

fn name_length(name: &FdName) -> usize {
    name.to_string().len() + 1
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// Before Linux 6.2 each count looks at all of them.
    #[test]
    fn open_files_are_not_counted_for_each_descriptor_that_is_taken_over_or_stored() {
        static COUNTS: AtomicU64 = AtomicU64::new(0);
        let counted = OpenFiles::counted_by(|| {
            COUNTS.fetch_add(1, Ordering::Relaxed);
            Some(Count {
                open: 30_000,
                limit: 1 << 20,
            })
        });
        let (pipe, _) = io::pipe().unwrap();
        let mut inherited = InheritedFds::default();
        for number in 0..100 {
            inherited.insert(FdName::Process(number), pipe.try_clone().unwrap().into());
        }
        let mut usage = StoreUsage {
            open_files: counted,
            ..StoreUsage::new(None, true)
        };
        usage.take_over(&inherited).unwrap();
        for number in 100..5_100 {
            let name = FdName::Process(number);
            usage.check_room(&name, 1).unwrap();
            let duplicates = usage.duplicate(&[]).unwrap();
            usage.add(name, 1, duplicates);
        }
        assert_eq!(usage.take_duplicates().len(), 5_100);
        let counts = COUNTS.load(Ordering::Relaxed);
        assert!(counts < 10, "{counts} counts");
    }

    #[test]
    fn what_cannot_be_handed_to_a_successor_is_refused_by_name() {
        let mut usage = StoreUsage::new(Some(3), false);
        let name = FdName::Process(7);
        usage.check_room(&name, 2).unwrap();
        usage.add(name, 2, Vec::new());
        let refused = usage.check_room(&FdName::Process(8), 2).unwrap_err();
        assert!(refused.to_string().contains("it holds 2 of 3"), "{refused}");
        usage.remove(&name);
        usage.check_room(&name, 3).unwrap();
        usage.limit = None;
        let most = MAX_NAMES_LENGTH / name_length(&name);
        assert!(usage.check_room(&name, most).is_ok());
        assert!(usage.check_room(&name, most + 1).is_err());
    }

    #[test]
    fn only_a_daemon_that_could_become_the_keeper_holds_duplicates() {
        let (pipe, _) = io::pipe().unwrap();
        let name = FdName::Process(7);
        for is_keeper in [true, false] {
            let mut usage = StoreUsage::new(None, is_keeper);
            assert_eq!(usage.begin_succession(), is_keeper);
            let duplicates = usage.duplicate(&[std::os::fd::AsFd::as_fd(&pipe)]).unwrap();
            usage.add(name, 1, duplicates);
            let duplicates = usage.take_duplicates();
            assert_eq!(duplicates.contains_key(&name), is_keeper);
        }
    }
}

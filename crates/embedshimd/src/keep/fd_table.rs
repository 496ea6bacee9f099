//! [`FdTable`]: the stored descriptors, by name. Owns how many there can be: as many as a successor
//! can be given.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::service_manager::activation::MAX_NAMES_LENGTH;
use crate::state_dir::file_id::FileId;

/// The stored descriptors, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct FdTable {
    entries: Vec<(String, OwnedFd)>,
    /// The length of all names with a colon after each.
    names_length: usize,
}

/// Why a descriptor cannot be stored.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Full {
    #[error(
        "there are {stored} already, a third of the limit of open files; raise that \
         (RLIMIT_NOFILE, LimitNOFILE=)"
    )]
    Descriptors { stored: usize },
    #[error(
        "there are {stored} already, and their names fill the longest string that a process can \
         be given"
    )]
    Names { stored: usize },
}

impl FdTable {
    /// Stores one more. It is closed if it is stored under this name already.
    pub(super) fn insert(
        &mut self,
        name: &str,
        descriptor: OwnedFd,
        limit: u64,
    ) -> Result<(), Full> {
        let stored = self.entries.len();
        if self
            .descriptors(name)
            .any(|other| is_same(other, descriptor.as_fd()))
        {
            return Ok(());
        }
        if stored >= max_stored(limit) {
            return Err(Full::Descriptors { stored });
        }
        if self.names_length + name.len() + 1 > MAX_NAMES_LENGTH {
            return Err(Full::Names { stored });
        }
        self.names_length += name.len() + 1;
        self.entries.push((name.into(), descriptor));
        Ok(())
    }

    /// Closes all that are stored under this name.
    pub(super) fn remove(&mut self, name: &str) {
        let before = self.entries.len();
        self.entries.retain(|(other, _)| other != name);
        self.names_length -= (before - self.entries.len()) * (name.len() + 1);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, BorrowedFd<'_>)> {
        self.entries
            .iter()
            .map(|(name, descriptor)| (name.as_str(), descriptor.as_fd()))
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    fn descriptors(&self, name: &str) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.iter()
            .filter(move |(other, _)| *other == name)
            .map(|(_, descriptor)| descriptor)
    }
}

/// How many descriptors a keeper can store that may have this many files open: each needs two more
/// while a successor is started.
pub(super) fn max_stored(limit: u64) -> usize {
    usize::try_from(limit / 3).unwrap_or(usize::MAX)
}

/// Whether two descriptors of the same name stand for the same thing. Sockets, pipes and files are
/// the same if their inodes are. All pidfds before Linux 6.9 share one inode: those of one name
/// stand for the same process.
fn is_same(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
    let one = FileId::of_descriptor(one);
    one.is_some() && one == FileId::of_descriptor(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pipe() -> OwnedFd {
        std::io::pipe().unwrap().0.into()
    }

    #[test]
    fn the_same_twice_is_stored_once_and_another_of_the_same_name_beside_it() {
        let mut table = FdTable::default();
        let first = pipe();
        for descriptor in [first.try_clone().unwrap(), first, pipe()] {
            table.insert("a", descriptor, 1000).unwrap();
        }
        table.insert("b", pipe(), 1000).unwrap();
        assert_eq!(table.len(), 3);
        table.remove("a");
        table.remove("never there");
        let names: Vec<&str> = table.iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["b"]);
        table.remove("b");
        assert_eq!((table.len(), table.names_length), (0, 0));
    }

    #[test]
    fn no_more_is_stored_than_a_successor_can_be_given() {
        let mut table = FdTable::default();
        for number in 0..4 {
            table.insert(&number.to_string(), pipe(), 12).unwrap();
        }
        assert_eq!(
            table.insert("5", pipe(), 12),
            Err(Full::Descriptors { stored: 4 })
        );
        let long = "x".repeat(MAX_NAMES_LENGTH - 8);
        assert_eq!(
            table.insert(&long, pipe(), 1000),
            Err(Full::Names { stored: 4 })
        );
    }
}

//! [`FdTable`]: the stored descriptors, by name. Owns how many there can be: as many as a successor
//! can be given.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::service_manager::activation::MAX_NAMES_LENGTH;
use crate::state_dir::file_id::FileId;

/// The stored descriptors by name, those of one name in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct FdTable {
    entries: BTreeMap<String, Vec<OwnedFd>>,
    /// The number of all descriptors.
    stored: usize,
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
        let stored = self.stored;
        let of_name = self.entries.get(name);
        let is_known = |other: &OwnedFd| is_same(other.as_fd(), descriptor.as_fd());
        if of_name.is_some_and(|of_name| of_name.iter().any(is_known)) {
            return Ok(());
        }
        if stored >= max_stored(limit) {
            return Err(Full::Descriptors { stored });
        }
        if self.names_length + name.len() + 1 > MAX_NAMES_LENGTH {
            return Err(Full::Names { stored });
        }
        self.names_length += name.len() + 1;
        self.stored += 1;
        self.entries
            .entry(name.into())
            .or_default()
            .push(descriptor);
        Ok(())
    }

    /// Closes all that are stored under this name.
    pub(super) fn remove(&mut self, name: &str) {
        let closed = self.entries.remove(name).map_or(0, |closed| closed.len());
        self.stored -= closed;
        self.names_length -= closed * (name.len() + 1);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, BorrowedFd<'_>)> {
        self.entries.iter().flat_map(|(name, descriptors)| {
            let name = name.as_str();
            descriptors
                .iter()
                .map(move |descriptor| (name, descriptor.as_fd()))
        })
    }

    pub(super) fn len(&self) -> usize {
        self.stored
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

//! [`Kept`]: the descriptors in our keeping, by name. Owns how many there can be: as many as a successor can be given.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::stat::fstat;

/// No string that `execve` takes is longer than 128 KiB, and `LISTEN_FDNAMES=` with all names is one. What was over would keep every
/// successor from being started.
pub(crate) const MAX_NAMES: usize = 128 * 1024 - 64;

/// What is kept, in the order in which it came.
#[derive(Debug, Default)]
pub(super) struct Kept {
    entries: Vec<(String, OwnedFd)>,
    /// The length of all names with a colon after each.
    names: usize,
}

/// Why one is not kept.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Full {
    #[error(
        "there are {kept} already, a third of the limit of open files; raise that (RLIMIT_NOFILE, LimitNOFILE=)"
    )]
    Descriptors { kept: usize },
    #[error(
        "there are {kept} already, and their names fill the longest string that a process can be given"
    )]
    Names { kept: usize },
}

impl Kept {
    /// Keeps one more. One that is kept under this name already is closed.
    pub(super) fn insert(
        &mut self,
        name: &str,
        descriptor: OwnedFd,
        limit: u64,
    ) -> Result<(), Full> {
        let kept = self.entries.len();
        if self
            .of(name)
            .any(|other| is_same(other, descriptor.as_fd()))
        {
            return Ok(());
        }
        if kept >= most(limit) {
            return Err(Full::Descriptors { kept });
        }
        if self.names + name.len() + 1 > MAX_NAMES {
            return Err(Full::Names { kept });
        }
        self.names += name.len() + 1;
        self.entries.push((name.into(), descriptor));
        Ok(())
    }

    /// Closes all that are kept under this name.
    pub(super) fn remove(&mut self, name: &str) {
        let before = self.entries.len();
        self.entries.retain(|(other, _)| other != name);
        self.names -= (before - self.entries.len()) * (name.len() + 1);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, BorrowedFd<'_>)> {
        self.entries
            .iter()
            .map(|(name, descriptor)| (name.as_str(), descriptor.as_fd()))
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    fn of(&self, name: &str) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.iter()
            .filter(move |(other, _)| *other == name)
            .map(|(_, descriptor)| descriptor)
    }
}

/// How many can be kept by a keeper that may have this many files open: two more are needed for each while a successor is started.
pub(super) fn most(limit: u64) -> usize {
    usize::try_from(limit / 3).unwrap_or(usize::MAX)
}

/// Sockets, pipes and files are the same if their inodes are. Others (a pidfd before Linux 6.9) share one inode: of the same name,
/// they mean the same too.
fn is_same(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
    match (fstat(one), fstat(other)) {
        (Ok(one), Ok(other)) => (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pipe() -> OwnedFd {
        std::io::pipe().unwrap().0.into()
    }

    #[test]
    fn the_same_twice_is_kept_once_and_another_of_the_same_name_beside_it() {
        let mut kept = Kept::default();
        let first = pipe();
        for descriptor in [first.try_clone().unwrap(), first, pipe()] {
            kept.insert("a", descriptor, 1000).unwrap();
        }
        kept.insert("b", pipe(), 1000).unwrap();
        assert_eq!(kept.len(), 3);
        kept.remove("a");
        kept.remove("never there");
        assert_eq!(kept.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["b"]);
        kept.remove("b");
        assert_eq!((kept.len(), kept.names), (0, 0));
    }

    #[test]
    fn no_more_is_kept_than_a_successor_can_be_given() {
        let mut kept = Kept::default();
        for number in 0..4 {
            kept.insert(&number.to_string(), pipe(), 12).unwrap();
        }
        assert_eq!(
            kept.insert("5", pipe(), 12),
            Err(Full::Descriptors { kept: 4 })
        );
        let long = "x".repeat(MAX_NAMES - 8);
        assert_eq!(
            kept.insert(&long, pipe(), 1000),
            Err(Full::Names { kept: 4 })
        );
    }
}

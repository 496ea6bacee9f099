//! Descriptors that have to outlive this process: [`FdStore`], which holds them meanwhile, the
//! names they are stored under, and [`InheritedFds`], what a predecessor has stored. Owns the
//! names; how a store is spoken to is its implementation's.

mod intake;
mod listener;
mod peek;
mod process_fds;
mod queue;
mod role;
mod stream_fd;
mod sys;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::str::FromStr;
use std::time::{Duration, Instant};

pub use intake::Intake;
pub use listener::{Listener, Waiting, accept};
pub(crate) use peek::peek;
pub(crate) use process_fds::ProcessFds;
pub(crate) use role::FdRole;
pub(crate) use stream_fd::StreamFd;

use crate::process::ProcessIdentity;

/// A service that holds descriptors for this process and gives them to its successor: systemd, or
/// embedshimd's keeper.
///
/// After `Ok` the descriptors are safe from the death of this process. Calls take effect in order.
pub trait FdStore: fmt::Debug + Send + Sync {
    /// Stores duplicates of these descriptors, beside what is stored under this name already. An
    /// error means that none of them is stored.
    fn add(&self, name: &FdName, descriptors: &[BorrowedFd<'_>]) -> io::Result<()>;

    /// Closes everything that is stored under this name.
    fn remove(&self, name: &FdName) -> io::Result<()>;

    /// The end of this process is durable. The store's process may have it as a zombie, inherited
    /// from a daemon that died, and a zombie keeps the init of its pid namespace from ending: it
    /// can be reaped.
    fn reap(&self, _process: ProcessIdentity) -> io::Result<()> {
        Ok(())
    }

    /// How processes of this number have ended that the store's process has inherited and reaped:
    /// when each started, in ticks since boot, and its wait status. Blocks, for some seconds at
    /// most.
    fn reaped(&self, _pid: i32) -> io::Result<Vec<(u64, i32)>> {
        Ok(Vec::new())
    }

    /// Whether the store's process gets what was stored, also if this one dies now. True as well if
    /// that process does not read, since that can last.
    fn is_settled(&self) -> bool {
        true
    }

    /// A part of what a predecessor has left is taken over. Where the store's process limits how
    /// long a start takes, it counts from here again.
    fn start_goes_on(&self) {}

    /// Whether a successor gets what is stored here.
    fn is_durable(&self) -> bool {
        true
    }
}

/// The longest that [`settle`] waits, if others store without pause.
const SETTLE: Duration = Duration::from_secs(2);

/// Waits until the store's process gets what was stored, also if this one dies. That takes no time
/// but for a burst, and ends soon where that process does not read; after 2 s in any case.
pub async fn settle(store: &dyn FdStore) {
    let give_up = Instant::now() + SETTLE;
    while !store.is_settled() && Instant::now() < give_up {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// No store: for programs whose containers' streams end with them, and for tests.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoFdStore;

impl FdStore for NoFdStore {
    fn add(&self, _: &FdName, _: &[BorrowedFd<'_>]) -> io::Result<()> {
        Ok(())
    }

    fn remove(&self, _: &FdName) -> io::Result<()> {
        Ok(())
    }

    fn is_durable(&self) -> bool {
        false
    }
}

/// What a stored descriptor belongs to. Its text is what `systemd-analyze fdstore` shows.
///
/// Short on purpose: all names together come back as one variable of the environment
/// (`LISTEN_FDNAMES`), and `execve` takes no string of more than 128 KiB. A container has three
/// entries, whatever the number of its streams, so that is enough for more than 3,000 containers
/// with more than 20,000 descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FdName {
    /// The socket that containerd connects to: `listener`.
    Listener,
    /// The socket of the sandbox controller: `sandbox-listener`.
    SandboxListener,
    /// The end that is read of the queue of accepted connections ([`Intake`]): `intake`.
    Intake,
    /// Its other end: `intake-sender`.
    IntakeSender,
    /// A connection, by a number that is never used again: `c/` and the number to the base of 36.
    Connection(u64),
    /// An answer on this connection that is not sent as a whole yet: `a/` and its number.
    Answer(u64),
    /// The descriptors of one process of a container, by a number that its record holds and that is
    /// never used again in this boot: `p/` and the number to the base of 36.
    Process(u64),
}

/// A text that is no name of this version: of another program, perhaps, or of another version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no name of a descriptor")]
pub struct InvalidFdName(String);

const BASE: u32 = 36;

impl fmt::Display for FdName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, mut rest) = match self {
            Self::Listener => return f.write_str("listener"),
            Self::SandboxListener => return f.write_str("sandbox-listener"),
            Self::Intake => return f.write_str("intake"),
            Self::IntakeSender => return f.write_str("intake-sender"),
            Self::Connection(number) => ("c/", *number),
            Self::Answer(number) => ("a/", *number),
            Self::Process(number) => ("p/", *number),
        };
        // 36^13 > 2^64.
        let mut digits = Vec::with_capacity(13);
        loop {
            let digit = u32::try_from(rest % u64::from(BASE)).unwrap_or(0);
            digits.extend(char::from_digit(digit, BASE));
            rest /= u64::from(BASE);
            if rest == 0 {
                break;
            }
        }
        f.write_str(kind)?;
        digits
            .iter()
            .rev()
            .try_for_each(|digit| write!(f, "{digit}"))
    }
}

impl FromStr for FdName {
    type Err = InvalidFdName;

    fn from_str(text: &str) -> Result<Self, InvalidFdName> {
        let invalid = || InvalidFdName(text.chars().take(255).collect());
        let number = |digits: &str| u64::from_str_radix(digits, BASE).map_err(|_| invalid());
        let name = match text.split_once('/') {
            None if text == "listener" => Self::Listener,
            None if text == "sandbox-listener" => Self::SandboxListener,
            None if text == "intake" => Self::Intake,
            None if text == "intake-sender" => Self::IntakeSender,
            Some(("c", digits)) => Self::Connection(number(digits)?),
            Some(("a", digits)) => Self::Answer(number(digits)?),
            Some(("p", digits)) => Self::Process(number(digits)?),
            _ => return Err(invalid()),
        };
        // One name has one text: `c/007` is not `c/7`.
        if name.to_string() == text {
            Ok(name)
        } else {
            Err(invalid())
        }
    }
}

/// What a predecessor has stored. Each owner takes its own; what is left is closed in the end.
#[derive(Debug, Default)]
pub struct InheritedFds(HashMap<FdName, Vec<OwnedFd>>);

impl InheritedFds {
    /// Adds one.
    pub fn insert(&mut self, name: FdName, descriptor: OwnedFd) {
        self.0.entry(name).or_default().push(descriptor);
    }

    /// How many descriptors are stored under each name.
    pub fn counts(&self) -> impl Iterator<Item = (FdName, usize)> {
        self.0.iter().map(|(name, fds)| (*name, fds.len()))
    }

    /// All that is stored, by name.
    pub fn iter(&self) -> impl Iterator<Item = (FdName, &[OwnedFd])> {
        self.0.iter().map(|(name, fds)| (*name, fds.as_slice()))
    }

    /// Takes the one that is stored under this name. If there are more, they are closed: they are
    /// duplicates that were stored twice.
    pub fn take(&mut self, name: &FdName) -> Option<OwnedFd> {
        self.0.remove(name)?.pop()
    }

    /// Takes all that are stored under this name.
    pub fn take_all(&mut self, name: &FdName) -> Vec<OwnedFd> {
        self.0.remove(name).unwrap_or_default()
    }

    /// Takes all connections, each with the answer that it was about to send.
    pub fn take_connections(&mut self) -> Vec<(u64, OwnedFd, Option<OwnedFd>)> {
        let numbers: Vec<u64> = self
            .0
            .keys()
            .filter_map(|name| match name {
                FdName::Connection(number) => Some(*number),
                _ => None,
            })
            .collect();
        let take = |number| {
            let connection = self.take(&FdName::Connection(number))?;
            Some((number, connection, self.take(&FdName::Answer(number))))
        };
        numbers.into_iter().filter_map(take).collect()
    }

    /// All that is stored, each with its name.
    pub fn into_all(self) -> impl Iterator<Item = (FdName, OwnedFd)> {
        let named = |(name, fds): (FdName, Vec<OwnedFd>)| fds.into_iter().map(move |fd| (name, fd));
        self.0.into_iter().flat_map(named)
    }

    /// The names of what is left, for the store to remove; the descriptors are closed.
    pub fn close_rest(self) -> Vec<FdName> {
        self.0.into_keys().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_names_of_three_thousand_containers_fit_into_one_variable() {
        // A number is microseconds since boot: a year has 14 digits.
        let year = 31_536_000_000_000;
        let of_container = [
            FdName::Connection(year),
            FdName::Process(year),
            FdName::Process(year),
        ];
        let length: usize = of_container
            .map(|name| name.to_string().len() + 1)
            .iter()
            .sum();
        assert!(3_000 * length < 128 * 1024, "{length}");
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for text in [
            "",
            "listener/",
            "c",
            "c/",
            "c/!",
            "c/007",
            "c/+7",
            "p/A",
            "p/1/",
            "p/1/2",
            "p/-1",
            "stored",
            "embedshimd.socket",
            "wrong/1",
            "conn/7",
        ] {
            assert!(text.parse::<FdName>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_name_is_read_as_it_was_written(number: u64) {
            for name in [
                FdName::Connection(number),
                FdName::Answer(number),
                FdName::Process(number),
            ] {
                prop_assert_eq!(name.to_string().parse::<FdName>(), Ok(name));
            }
        }

        #[test]
        fn any_text_is_one_name_or_none(text in "(listener|sandbox-listener|(a|c|p|x)(/[0-9a-z.:]{1,20}){0,2})") {
            if let Ok(name) = text.parse::<FdName>() {
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }
}

//! Descriptors that have to outlive this process, and who keeps them meanwhile: [`DescriptorStore`], the names they are kept under, and
//! [`Inherited`], what a predecessor has left. Owns the names; how a store is spoken to is its implementation's.

mod deposit;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::str::FromStr;

pub(crate) use deposit::Deposit;

use crate::process::ProcessIdentity;

/// Somebody who holds descriptors for us and gives them to our successor: systemd, or embedshimd's keeper.
///
/// Each call is one datagram and returns when it is queued: from then on the descriptor is safe from our death. They are carried out in
/// order. An error means that it is not kept, and nothing else.
pub trait DescriptorStore: fmt::Debug + Send + Sync {
    /// Keeps a duplicate of `descriptor`, beside what is kept under this name already.
    fn keep(&self, name: &DescriptorName, descriptor: BorrowedFd<'_>) -> io::Result<()>;

    /// Closes everything that is kept under this name.
    fn forget(&self, name: &DescriptorName) -> io::Result<()>;

    /// The end of this process is written down. Who keeps for us perhaps has it as a zombie, inherited from a daemon that died, and a
    /// zombie keeps the init of its pid namespace from ending: it can be reaped.
    fn reap(&self, _process: ProcessIdentity) -> io::Result<()> {
        Ok(())
    }
}

/// Nobody keeps anything: for programs whose containers end with them, and for tests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unkept;

impl DescriptorStore for Unkept {
    fn keep(&self, _: &DescriptorName, _: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }

    fn forget(&self, _: &DescriptorName) -> io::Result<()> {
        Ok(())
    }
}

/// What a kept descriptor belongs to. Its text is what `systemd-analyze fdstore` shows.
///
/// Short on purpose, with numbers instead of ids: all names together come back as one variable of the environment
/// (`LISTEN_FDNAMES`), and no string that `execve` takes is longer than 128 KiB. That is enough for about 5,000 descriptors; with the
/// ids of Kubernetes it would be for 1,500, and one more would keep every successor from being started.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DescriptorName {
    /// The socket that containerd connects to: `listener`.
    Listener,
    /// A connection, by a number that is never used again: `conn/17`.
    Connection(u64),
    /// A process's, by a number that its record holds and that is never used again in this boot: `stdin/4711`.
    Process(Role, u64),
}

/// What a descriptor is to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The master of its pseudo-terminal.
    Terminal,
    /// The writing end of its standard input.
    Stdin,
    /// The reading end of it, until the process has its own, or for a terminal.
    StdinReader,
    /// An end of its standard output: of a fifo the reading one, of a logger's pipe the writing one.
    Stdout,
    /// An end of its standard error.
    Stderr,
    /// The socket over which the OCI runtime hands over its terminal.
    Console,
    /// Its pidfd.
    Pidfd,
}

/// A name that says nothing to us: of another program, perhaps, or of a newer version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no name of a descriptor")]
pub struct InvalidName(String);

impl Role {
    const ALL: [Self; 7] = [
        Self::Terminal,
        Self::Stdin,
        Self::StdinReader,
        Self::Stdout,
        Self::Stderr,
        Self::Console,
        Self::Pidfd,
    ];

    fn as_str(self) -> &'static str {
        match self {
            Self::Terminal => "terminal",
            Self::Stdin => "stdin",
            Self::StdinReader => "stdin-reader",
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::Console => "console",
            Self::Pidfd => "pidfd",
        }
    }
}

impl fmt::Display for DescriptorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listener => f.write_str("listener"),
            Self::Connection(number) => write!(f, "conn/{number}"),
            Self::Process(role, number) => write!(f, "{}/{number}", role.as_str()),
        }
    }
}

impl FromStr for DescriptorName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let unknown = || InvalidName(text.chars().take(255).collect());
        let name = match text.split_once('/') {
            None if text == "listener" => Self::Listener,
            None => return Err(unknown()),
            Some((kind, number)) => {
                let number = number.parse().map_err(|_| unknown())?;
                match Role::ALL.into_iter().find(|role| role.as_str() == kind) {
                    Some(role) => Self::Process(role, number),
                    None if kind == "conn" => Self::Connection(number),
                    None => return Err(unknown()),
                }
            }
        };
        // One name has one text: `conn/007` is not `conn/7`.
        if name.to_string() == text {
            Ok(name)
        } else {
            Err(unknown())
        }
    }
}

/// What a predecessor has left with the store. Whoever an entry belongs to takes it; what nobody takes is closed in the end.
#[derive(Debug, Default)]
pub struct Inherited(HashMap<DescriptorName, Vec<OwnedFd>>);

impl Inherited {
    /// Adds one.
    pub fn insert(&mut self, name: DescriptorName, descriptor: OwnedFd) {
        self.0.entry(name).or_default().push(descriptor);
    }

    /// Takes the one kept under this name. If there are more, they are closed: they are duplicates that were kept again.
    pub fn take(&mut self, name: &DescriptorName) -> Option<OwnedFd> {
        self.0.remove(name)?.pop()
    }

    /// Takes all that are kept under this name.
    pub fn take_all(&mut self, name: &DescriptorName) -> Vec<OwnedFd> {
        self.0.remove(name).unwrap_or_default()
    }

    /// Takes all connections.
    pub fn take_connections(&mut self) -> Vec<(u64, OwnedFd)> {
        let numbers: Vec<u64> = self
            .0
            .keys()
            .filter_map(|name| match name {
                DescriptorName::Connection(number) => Some(*number),
                _ => None,
            })
            .collect();
        let take = |number| Some((number, self.take(&DescriptorName::Connection(number))?));
        numbers.into_iter().filter_map(take).collect()
    }

    /// The names of what is left, for the store to forget; the descriptors are closed.
    pub fn close_rest(self) -> Vec<DescriptorName> {
        self.0.into_keys().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn thousands_of_names_fit_into_one_variable() {
        // A number is microseconds since boot: a year has 14 digits.
        let name = DescriptorName::Process(Role::StdinReader, 31_536_000_000_000);
        assert!(4_500 * (name.to_string().len() + 1) < 131_072, "{name}");
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for text in [
            "",
            "listener/",
            "conn",
            "conn/",
            "conn/x",
            "conn/007",
            "conn/+7",
            "stdin/a",
            "stdin/1/",
            "stdin/1/2",
            "stdin/-1",
            "stored",
            "embedshimd.socket",
            "wrong/1",
        ] {
            assert!(text.parse::<DescriptorName>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_one_name_or_none(text in "(listener|(conn|stdin|pidfd|x)(/[0-9a-z.:]{1,20}){0,2})") {
            if let Ok(name) = text.parse::<DescriptorName>() {
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }
}

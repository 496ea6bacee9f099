//! Descriptors that have to outlive this process, and who keeps them meanwhile: [`DescriptorStore`], the names they are kept under, and
//! [`Inherited`], what a predecessor has left. Owns the names; how a store is spoken to is its implementation's.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::str::FromStr;

use crate::id::{InvalidId, ProcessKey, TaskKey};

/// Somebody who holds descriptors for us and gives them to our successor: systemd, or embedshimd's keeper.
///
/// Both calls are one datagram and return when it is queued: from then on the descriptor is safe from our death. They are carried out in
/// order. An error means that it is not kept, and nothing else.
pub trait DescriptorStore: fmt::Debug + Send + Sync {
    /// Keeps a duplicate of `descriptor`, beside what is kept under this name already.
    fn keep(&self, name: &DescriptorName, descriptor: BorrowedFd<'_>) -> io::Result<()>;

    /// Closes everything that is kept under this name.
    fn forget(&self, name: &DescriptorName) -> io::Result<()>;
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

/// What a kept descriptor belongs to. Its text is what `systemd-analyze fdstore` shows; at most 240 of the 255 bytes that
/// systemd allows, and never a colon or a control character, since ids have none.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DescriptorName {
    /// The socket that containerd connects to: `listener`.
    Listener,
    /// A connection, by a number that is never used again: `conn/17`.
    Connection(u64),
    /// A process's: `stdin/default/web` of an init, `terminal/default/web/shell` of an exec.
    Process(Role, ProcessKey),
}

/// What a descriptor is to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The master of its pseudo-terminal.
    Terminal,
    /// The writing end of its standard input.
    Stdin,
    /// The reading end of its standard output.
    Stdout,
    /// The reading end of its standard error.
    Stderr,
    /// Its pidfd.
    Pidfd,
}

/// A name that says nothing to us.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidName {
    /// Of another program, perhaps, or of a newer version.
    #[error("{0:?} is no name of a descriptor")]
    Unknown(String),
    /// A part of it is no id.
    #[error(transparent)]
    Id(#[from] InvalidId),
}

impl Role {
    const ALL: [Self; 5] = [
        Self::Terminal,
        Self::Stdin,
        Self::Stdout,
        Self::Stderr,
        Self::Pidfd,
    ];

    fn as_str(self) -> &'static str {
        match self {
            Self::Terminal => "terminal",
            Self::Stdin => "stdin",
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::Pidfd => "pidfd",
        }
    }
}

impl fmt::Display for DescriptorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listener => f.write_str("listener"),
            Self::Connection(number) => write!(f, "conn/{number}"),
            Self::Process(role, key) => {
                let (role, task) = (role.as_str(), &key.task);
                write!(f, "{role}/{}/{}", task.namespace, task.id)?;
                key.exec
                    .as_ref()
                    .map_or(Ok(()), |exec| write!(f, "/{exec}"))
            }
        }
    }
}

impl FromStr for DescriptorName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let unknown = || InvalidName::Unknown(text.chars().take(255).collect());
        let parts: Vec<&str> = text.split('/').collect();
        let name = match *parts.as_slice() {
            ["listener"] => Self::Listener,
            ["conn", number] => Self::Connection(number.parse().map_err(|_| unknown())?),
            [role, namespace, id, ref exec @ ..] if exec.len() < 2 => {
                let role = Role::ALL.into_iter().find(|known| known.as_str() == role);
                let task = TaskKey {
                    namespace: namespace.parse()?,
                    id: id.parse()?,
                };
                let exec = exec.first().map(|exec| exec.parse()).transpose()?;
                Self::Process(role.ok_or_else(unknown)?, ProcessKey { task, exec })
            }
            _ => return Err(unknown()),
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
    fn the_longest_name_fits() {
        let longest = "a".repeat(76);
        let text = format!("terminal/{longest}/{longest}/{longest}");
        let name: DescriptorName = text.parse().unwrap();
        assert_eq!(name.to_string(), text);
        assert!(text.len() <= 255, "{}", text.len());
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
            "stdin/a/",
            "stdin/a/../b",
            "stdin/a/b/c/d",
            "stored",
            "embedshimd.socket",
            "wrong/a/b",
        ] {
            assert!(text.parse::<DescriptorName>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_one_name_or_none(text in "(listener|conn/[0-9]{1,20}|(stdin|pidfd|x)(/[a-z.:]{1,4}){0,4})") {
            if let Ok(name) = text.parse::<DescriptorName>() {
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }
}

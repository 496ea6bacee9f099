//! [`Handover`]: what a keeper passes to the one that it becomes by `execve`: the meaning of each
//! descriptor, the daemon's pid, and the statuses of processes that it reaped before the daemon
//! asked for them. Owns the format, a line for each thing in a memory file; the descriptors stay
//! open under their numbers.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use anyhow::{Context, bail};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use tracing::warn;

use super::fd_table::FdTable;
use super::zombies::{Reaped, Zombies};
use crate::service_manager::message::is_name;
use crate::sys;

/// A version of the format. A keeper does not become a program that understands none of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Descriptors and the daemon: for versions that cannot take over statuses.
    Descriptors,
    /// Descriptors, the daemon, and the statuses of reaped processes.
    Statuses,
}

impl Format {
    /// All versions, the best first.
    pub(super) const ALL: [Self; 2] = [Self::Statuses, Self::Descriptors];

    /// The name of the version, as `embedshimd keep --understands` takes it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Descriptors => "1",
            Self::Statuses => "2",
        }
    }

    /// The version of this name, if this keeper understands it.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }
}

/// The longest text in bytes: no keeper stores that many descriptors.
const MAX_LENGTH: u64 = 1 << 20;

/// Everything that is passed on.
#[derive(Debug)]
pub(super) struct Handover {
    pub(super) inbox: OwnedFd,
    pub(super) lock: OwnedFd,
    pub(super) daemon: Option<i32>,
    /// The stored descriptors, each with its name.
    pub(super) stored: Vec<(String, OwnedFd)>,
    /// The statuses of reaped processes, the latest first.
    pub(super) reaped: Vec<Reaped>,
}

/// A handover that is written down, with all its descriptors inheritable: as long as this value
/// exists, every program that is started gets them.
#[derive(Debug)]
pub(super) struct Open<'a> {
    file: File,
    descriptors: Vec<BorrowedFd<'a>>,
}

impl<'a> Open<'a> {
    pub(super) fn new(
        format: Format,
        (inbox, lock): (BorrowedFd<'a>, BorrowedFd<'a>),
        daemon: Option<i32>,
        fds: &'a FdTable,
        zombies: &Zombies,
    ) -> anyhow::Result<Self> {
        let mut text = format!(
            "keeper {}\ninbox {}\nlock {}\ndaemon {}\n",
            format.name(),
            inbox.as_raw_fd(),
            lock.as_raw_fd(),
            daemon.unwrap_or(0)
        );
        let mut descriptors = vec![inbox, lock];
        for (name, descriptor) in fds.iter() {
            writeln!(text, "descriptor {} {name}", descriptor.as_raw_fd())?;
            descriptors.push(descriptor);
        }
        if format == Format::Statuses {
            write_reaped(&mut text, zombies)?;
        }
        let mut file = File::from(memfd_create("keeper", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(text.as_bytes())?;
        let open = Self { file, descriptors };
        open.set(FdFlag::empty())?;
        Ok(open)
    }

    /// The descriptor of the memory file.
    pub(super) fn number(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn set(&self, flag: FdFlag) -> nix::Result<()> {
        for descriptor in self.descriptors.iter().chain([&self.file.as_fd()]) {
            fcntl(descriptor, FcntlArg::F_SETFD(flag))?;
        }
        Ok(())
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        // Fails only for a descriptor that is not open, and these are.
        let _ = self.set(FdFlag::FD_CLOEXEC);
    }
}

fn write_reaped(text: &mut String, zombies: &Zombies) -> std::fmt::Result {
    for Reaped {
        pid,
        start_ticks,
        status,
    } in zombies.all_reaped()
    {
        writeln!(text, "reaped {pid} {start_ticks} {status}")?;
    }
    Ok(())
}

fn parse_reaped(line: &str) -> Option<Reaped> {
    let mut words = line.strip_prefix("reaped ")?.split(' ');
    let reaped = Reaped {
        pid: words.next()?.parse().ok()?,
        start_ticks: words.next()?.parse().ok()?,
        status: words.next()?.parse().ok()?,
    };
    words.next().is_none().then_some(reaped)
}

impl Handover {
    /// Reads the memory file that a former keeper has left under this descriptor.
    pub(super) fn take(number: RawFd) -> anyhow::Result<Self> {
        let mut file = File::from(sys::own(number).context("no such descriptor")?);
        file.rewind()?;
        let mut text = String::new();
        file.take(MAX_LENGTH).read_to_string(&mut text)?;
        Self::parse(&text, sys::own)
    }

    fn parse(text: &str, own: impl Fn(RawFd) -> std::io::Result<OwnedFd>) -> anyhow::Result<Self> {
        let mut lines = text.lines();
        let mut next = |key: &str| {
            let line = lines.next().unwrap_or_default();
            line.strip_prefix(key)
                .and_then(|rest| rest.strip_prefix(' '))
                .with_context(|| format!("{line:?} in the place of {key}"))
        };
        let name = next("keeper")?;
        let format =
            Format::from_name(name).with_context(|| format!("the format {name} is unknown"))?;
        let inbox = own(next("inbox")?.parse()?)?;
        let lock = own(next("lock")?.parse()?)?;
        let daemon = Some(next("daemon")?.parse()?).filter(|&pid| pid > 0);
        let (mut stored, mut reaped) = (Vec::new(), Vec::new());
        for line in lines {
            if format == Format::Statuses
                && let Some(known) = parse_reaped(line)
            {
                reaped.push(known);
                continue;
            }
            let descriptor = line
                .strip_prefix("descriptor ")
                .and_then(|rest| rest.split_once(' '));
            let Some((number, name)) = descriptor.filter(|(_, name)| is_name(name)) else {
                bail!("{line:?} is neither a descriptor nor a status");
            };
            // One that is missing is no reason to lose the others.
            match own(number.parse()?) {
                Ok(descriptor) => stored.push((name.into(), descriptor)),
                Err(error) => warn!(
                    name,
                    %error,
                    "a stored descriptor is lost: the former keeper did not pass it on"
                ),
            }
        }
        Ok(Self {
            inbox,
            lock,
            daemon,
            stored,
            reaped,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(_: RawFd) -> std::io::Result<OwnedFd> {
        Ok(std::io::pipe()?.0.into())
    }

    #[test]
    fn what_is_written_is_read() {
        let text =
            "keeper 1\ninbox 4\nlock 5\ndaemon 77\ndescriptor 6 listener\ndescriptor 9 conn/7\n";
        let handover = Handover::parse(text, any).unwrap();
        let names: Vec<&str> = handover
            .stored
            .iter()
            .map(|(name, _)| name.as_str())
            .collect();
        assert_eq!(
            (handover.daemon, names),
            (Some(77), vec!["listener", "conn/7"])
        );
        let none = Handover::parse("keeper 1\ninbox 4\nlock 5\ndaemon 0\n", any).unwrap();
        assert_eq!(none.daemon, None);
    }

    #[test]
    fn statuses_of_reaped_processes_go_from_keeper_to_keeper_if_both_know_of_them() {
        let known = [(7, 11, 1 << 8), (7, 9, 9)].map(|(pid, start_ticks, status)| Reaped {
            start_ticks,
            pid,
            status,
        });
        let fds = FdTable::default();
        for (format, expected) in [
            (Format::Statuses, known.as_slice()),
            (Format::Descriptors, &[]),
        ] {
            let (inbox, lock) = (any(0).unwrap(), any(0).unwrap());
            let ends = (inbox.as_fd(), lock.as_fd());
            let zombies = Zombies::with(known);
            let open = Open::new(format, ends, Some(77), &fds, &zombies).unwrap();
            let mut file = &open.file;
            file.rewind().unwrap();
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            let handover = Handover::parse(&text, any).unwrap();
            assert_eq!(
                (handover.daemon, handover.reaped.as_slice()),
                (Some(77), expected)
            );
            assert_eq!(Format::from_name(format.name()), Some(format));
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "keeper 3\ninbox 4\nlock 5\ndaemon 77\n",
            "keeper 1\ninbox x\nlock 5\ndaemon 77\n",
            "keeper 1\ninbox 4\nlock 5\n",
            "keeper 1\ninbox 4\nlock 5\ndaemon 77\ndescriptor 6\n",
            "keeper 1\ninbox 4\nlock 5\ndaemon 77\nnonsense 6 a\n",
            "keeper 1\ninbox 4\nlock 5\ndaemon 77\ndescriptor 6 a:b\n",
            "keeper 1\ninbox 4\nlock 5\ndaemon 77\nreaped 7 11 256\n",
            "keeper 2\ninbox 4\nlock 5\ndaemon 77\nreaped 7 11\n",
            "keeper 2\ninbox 4\nlock 5\ndaemon 77\nreaped 7 11 256 1\n",
            "keeper 2\ninbox 4\nlock 5\ndaemon 77\nreaped 7 11 99999999999\n",
        ] {
            assert!(Handover::parse(text, any).is_err(), "{text}");
        }
    }
}

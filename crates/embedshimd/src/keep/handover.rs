//! What a keeper tells the one that it becomes by `execve`: which descriptor is what, and who the daemon is. Owns the format, a line
//! for each thing in a file in memory; the descriptors themselves stay open under their numbers.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use anyhow::{Context, bail, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use tracing::warn;

use super::kept::Kept;
use super::message::is_name;
use crate::sys;

/// The version of the format. Another one is another keeper's, and ours refuses to become it.
pub(super) const FORMAT: &str = "1";
/// No keeper has that many descriptors.
const MAX_LENGTH: u64 = 1 << 20;

/// Everything that is told.
#[derive(Debug)]
pub(super) struct Handover {
    pub(super) inbox: OwnedFd,
    pub(super) lock: OwnedFd,
    pub(super) daemon: Option<i32>,
    pub(super) kept: Vec<(String, OwnedFd)>,
}

/// Writes it down and lets the descriptors through. While this lives they are inherited by every program that is started.
#[derive(Debug)]
pub(super) struct Open<'a> {
    file: File,
    descriptors: Vec<BorrowedFd<'a>>,
}

impl<'a> Open<'a> {
    pub(super) fn new(
        inbox: BorrowedFd<'a>,
        lock: BorrowedFd<'a>,
        daemon: Option<i32>,
        kept: &'a Kept,
    ) -> anyhow::Result<Self> {
        let mut text = format!(
            "keeper {FORMAT}\ninbox {}\nlock {}\ndaemon {}\n",
            inbox.as_raw_fd(),
            lock.as_raw_fd(),
            daemon.unwrap_or(0)
        );
        let mut descriptors = vec![inbox, lock];
        for (name, descriptor) in kept.iter() {
            writeln!(text, "descriptor {} {name}", descriptor.as_raw_fd())?;
            descriptors.push(descriptor);
        }
        let mut file = File::from(memfd_create("keeper", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(text.as_bytes())?;
        let open = Self { file, descriptors };
        open.set(FdFlag::empty())?;
        Ok(open)
    }

    /// The number of the file.
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
        // It fails for a descriptor that is not open only, and these are.
        let _ = self.set(FdFlag::FD_CLOEXEC);
    }
}

impl Handover {
    /// Takes over what is told in the file of this number.
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
        let format = next("keeper")?;
        ensure!(format == FORMAT, "the format is {format}, not {FORMAT}");
        let inbox = own(next("inbox")?.parse()?)?;
        let lock = own(next("lock")?.parse()?)?;
        let daemon = Some(next("daemon")?.parse()?).filter(|&pid| pid > 0);
        let mut kept = Vec::new();
        for line in lines {
            let descriptor = line
                .strip_prefix("descriptor ")
                .and_then(|rest| rest.split_once(' '));
            let Some((number, name)) = descriptor.filter(|(_, name)| is_name(name)) else {
                bail!("{line:?} is no descriptor");
            };
            // The others are more important than that this one is there.
            match own(number.parse()?) {
                Ok(descriptor) => kept.push((name.into(), descriptor)),
                Err(error) => warn!(name, %error, "a descriptor is lost"),
            }
        }
        Ok(Self {
            inbox,
            lock,
            daemon,
            kept,
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
        let told = Handover::parse(text, any).unwrap();
        let names: Vec<&str> = told.kept.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!((told.daemon, names), (Some(77), vec!["listener", "conn/7"]));
        let nobody = Handover::parse("keeper 1\ninbox 4\nlock 5\ndaemon 0\n", any).unwrap();
        assert_eq!(nobody.daemon, None);
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "keeper 2\ninbox 4\nlock 5\ndaemon 77\n",
            "keeper 1\ninbox x\nlock 5\ndaemon 77\n",
            "keeper 1\ninbox 4\nlock 5\n",
            "keeper 1\ninbox 4\nlock 5\ndaemon 77\ndescriptor 6\n",
            "keeper 1\ninbox 4\nlock 5\ndaemon 77\nnonsense 6 a\n",
            "keeper 1\ninbox 4\nlock 5\ndaemon 77\ndescriptor 6 a:b\n",
        ] {
            assert!(Handover::parse(text, any).is_err(), "{text}");
        }
    }
}

//! [`Manager`]: the service manager that started the daemon and holds its descriptors, systemd or
//! `embedshimd keep`, by way of the datagrams of `sd_notify(3)`. Owns their form, their order while
//! the manager does not read, and how many descriptors it takes; what is stored under which name is
//! the callers'.

pub(crate) mod activation;
pub(crate) mod message;
mod outgoing;

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use embedshim_core::failpoint;
use embedshim_core::fdstore::{FdName, FdStore, InheritedFds};
use embedshim_core::process::ProcessIdentity;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use tracing::warn;

use crate::keep::MAX_NAMES;
use message::{REAP, REAPED, RESTORE};
use outgoing::Outgoing;

/// How long the manager may take to have handled everything.
const BARRIER_LIMIT: u16 = 5_000;
/// How long it may take to say how a process has ended.
const ANSWER_LIMIT: u16 = 30_000;
/// More than it ever says.
const MAX_ANSWER: u64 = 16 * 1024;
/// Descriptors that are left for requests under way and for the start of a successor.
const SPARE: u64 = 32;

/// The manager's socket, and what is stored there.
#[derive(Debug)]
pub(crate) struct Manager {
    outgoing: Outgoing,
    stored: Mutex<Stored>,
}

#[derive(Debug, Default)]
struct Stored {
    counts: HashMap<FdName, usize>,
    /// Duplicates of all of them, should this process have to take the keeper's place; none where
    /// systemd holds them, or where there are too many.
    held: Option<HashMap<FdName, Vec<OwnedFd>>>,
    /// The keeper has ended, and this process is about to take its place: nothing is given up.
    is_succession: bool,
    total: usize,
    /// The length of all names with a colon after each, a name for each descriptor.
    names: usize,
    /// The most that the manager holds, if it says so.
    limit: Option<usize>,
}

/// Why a descriptor is not stored.
#[derive(Debug, thiserror::Error)]
enum Full {
    #[error(
        "the descriptor store is full: it holds {total} of {limit}; raise FileDescriptorStoreMax= of the unit, or without systemd the \
         limit of open files"
    )]
    Limit { total: usize, limit: usize },
    #[error(
        "the descriptor store is full: the names of {total} descriptors fill the longest string that a process can be given"
    )]
    Names { total: usize },
    #[error(
        "{open} of {limit} files are open, and a successor needs as many; raise the limit of open files (RLIMIT_NOFILE, LimitNOFILE=)"
    )]
    OpenFiles { open: u64, limit: u64 },
}

impl Stored {
    fn admit(&self, name: &FdName, count: usize) -> Result<(), Full> {
        let total = self.total;
        if let Some(limit) = self.limit
            && total + count > limit
        {
            return Err(Full::Limit { total, limit });
        }
        if self.names + count * length(name) > MAX_NAMES {
            return Err(Full::Names { total });
        }
        if *name != FdName::Listener
            && let Some((open, limit)) = open_files()
            && open + SPARE > limit
        {
            return Err(Full::OpenFiles { open, limit });
        }
        Ok(())
    }

    /// What is to be held beside. Where few files may be open, requests need them more.
    fn duplicate(&mut self, descriptors: &[BorrowedFd<'_>]) -> io::Result<Vec<OwnedFd>> {
        if self.held.is_none() {
            return Ok(Vec::new());
        }
        if let Some((open, limit)) = open_files()
            && open > limit / 2
            && !self.is_succession
        {
            warn!(
                open,
                limit,
                "half of the files that may be open are: with them this process cannot take the keeper's place; raise the limit of \
                 open files (RLIMIT_NOFILE)"
            );
            self.held = None;
            return Ok(Vec::new());
        }
        let duplicates = descriptors.iter().map(BorrowedFd::try_clone_to_owned);
        duplicates.collect()
    }

    fn add(&mut self, name: FdName, count: usize, held: Vec<OwnedFd>) {
        if let Some(all) = &mut self.held {
            all.entry(name).or_default().extend(held);
        }
        *self.counts.entry(name).or_default() += count;
        self.total += count;
        self.names += count * length(&name);
    }

    fn remove(&mut self, name: &FdName) {
        if let Some(all) = &mut self.held {
            all.remove(name);
        }
        let count = self.counts.remove(name).unwrap_or(0);
        self.total -= count;
        self.names -= count * length(name);
    }
}

fn length(name: &FdName) -> usize {
    name.to_string().len() + 1
}

/// How many files this process has open, and may have. Linux 6.2 tells the number as the size of
/// the directory.
fn open_files() -> Option<(u64, u64)> {
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    let open = match std::fs::metadata("/proc/self/fd").ok()?.size() {
        0 => std::fs::read_dir("/proc/self/fd").ok()?.count() as u64,
        open => open,
    };
    Some((open, limit))
}

impl Manager {
    /// The one that `NOTIFY_SOCKET` names: a path, or an abstract name after `@`. It holds `limit`
    /// descriptors at most, if that is known, and these already. It can end, if it `is_keeper`.
    pub(crate) fn new(
        address: &OsString,
        limit: Option<usize>,
        inherited: &InheritedFds,
        is_keeper: bool,
    ) -> io::Result<Self> {
        let bytes = address.as_bytes();
        let address = match bytes.strip_prefix(b"@") {
            Some(name) => SocketAddrUnix::new_abstract_name(name)?,
            None => SocketAddrUnix::new(bytes)?,
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        // Connected, so that it goes on when somebody removes the address from the file system.
        match connect(&socket, &address) {
            // It has ended meanwhile, and this process is to take its place.
            Err(Errno::CONNREFUSED | Errno::NOENT) if is_keeper => {}
            connected => connected?,
        }
        let mut stored = Stored {
            limit,
            held: is_keeper.then(HashMap::new),
            ..Stored::default()
        };
        for (name, descriptors) in inherited.iter() {
            let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
            let held = stored.duplicate(&descriptors)?;
            stored.add(name, descriptors.len(), held);
        }
        Ok(Self {
            outgoing: Outgoing::new(socket),
            stored: Mutex::new(stored),
        })
    }

    /// We serve: units that waited for us can go on.
    pub(crate) fn ready(&self) -> io::Result<()> {
        self.outgoing.send("READY=1\n".into(), &[])
    }

    /// What was in the state directory has been removed: the keeper makes its files again. systemd,
    /// which has none there, ignores it.
    pub(crate) fn restore(&self) -> io::Result<()> {
        self.outgoing.send(format!("{RESTORE}=1\n"), &[])
    }

    /// The daemon is alive, which is to be said again and again.
    pub(crate) fn alive(&self) -> io::Result<()> {
        self.outgoing.send("WATCHDOG=1\n".into(), &[])
    }

    /// Whether this process holds everything that is stored itself.
    ///
    /// From here on it does not give that up: it is about to take the keeper's place.
    pub(crate) fn holds_all(&self) -> bool {
        let mut stored = self.stored();
        stored.is_succession = true;
        stored.held.is_some()
    }

    /// Everything that is stored, by name, to be kept by this process itself.
    pub(crate) fn take_held(&self) -> Vec<(String, OwnedFd)> {
        let held = self.stored().held.take().unwrap_or_default();
        let named = |(name, descriptors): (FdName, Vec<OwnedFd>)| {
            let name = name.to_string();
            descriptors
                .into_iter()
                .map(move |descriptor| (name.clone(), descriptor))
        };
        held.into_iter().flat_map(named).collect()
    }

    /// A pipe that ends when the manager has handled everything that was ever sent.
    pub(crate) fn barrier(&self) -> io::Result<PipeReader> {
        let (ours, theirs) = io::pipe()?;
        self.outgoing
            .send("BARRIER=1\n".into(), &[theirs.as_fd()])?;
        Ok(ours)
    }

    /// We are about to leave. Returns when everything that was ever sent is handled, or after a
    /// while.
    pub(crate) fn stopping(&self) -> io::Result<()> {
        self.outgoing.send("STOPPING=1\n".into(), &[])?;
        wait_for_end(&mut self.barrier()?)
    }

    /// Closes what is stored under a name that says nothing to us.
    pub(crate) fn forget_text(&self, name: &str) -> io::Result<()> {
        self.outgoing
            .send(format!("FDSTOREREMOVE=1\nFDNAME={name}\n"), &[])
    }

    fn stored(&self) -> MutexGuard<'_, Stored> {
        self.stored.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FdStore for Manager {
    fn keep(&self, name: &FdName, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut stored = self.stored();
        stored
            .admit(name, descriptors.len())
            .map_err(io::Error::other)?;
        let held = stored.duplicate(descriptors)?;
        failpoint::step("before FDSTORE");
        // Stored when its peer has left too: our successor has to know that.
        let text = format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0\n");
        self.outgoing.send(text, descriptors)?;
        stored.add(*name, descriptors.len(), held);
        failpoint::step("after FDSTORE");
        Ok(())
    }

    fn forget(&self, name: &FdName) -> io::Result<()> {
        failpoint::step("before FDSTOREREMOVE");
        let mut stored = self.stored();
        let forgotten = self.forget_text(&name.to_string());
        stored.remove(name);
        failpoint::step("after FDSTOREREMOVE");
        forgotten
    }

    fn reap(&self, process: ProcessIdentity) -> io::Result<()> {
        let (pid, start_ticks) = (process.pid, process.start_ticks);
        self.outgoing
            .send(format!("{REAP}={pid} {start_ticks}\n"), &[])
    }

    fn reaped(&self, pid: i32) -> io::Result<Vec<(u64, i32)>> {
        let (ours, theirs) = io::pipe()?;
        self.outgoing
            .send(format!("{REAPED}={pid}\n"), &[theirs.as_fd()])?;
        drop(theirs);
        let mut polled = [PollFd::new(ours.as_fd(), PollFlags::POLLIN)];
        if poll(&mut polled, PollTimeout::from(ANSWER_LIMIT))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // It is written at once. systemd, which does not know the question, closes the pipe.
        let mut text = String::new();
        ours.take(MAX_ANSWER).read_to_string(&mut text)?;
        let line = |line: &str| {
            let (start_ticks, status) = line.split_once(' ')?;
            Some((start_ticks.parse().ok()?, status.parse().ok()?))
        };
        Ok(text.lines().filter_map(line).collect())
    }
}

fn wait_for_end(pipe: &mut PipeReader) -> io::Result<()> {
    let mut polled = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
    if poll(&mut polled, PollTimeout::from(BARRIER_LIMIT))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    pipe.read(&mut [0]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_handed_to_a_successor_is_refused_by_name() {
        let mut stored = Stored {
            limit: Some(3),
            ..Stored::default()
        };
        let name = FdName::Process(7);
        stored.admit(&name, 2).unwrap();
        stored.add(name, 2, Vec::new());
        let refused = stored.admit(&FdName::Process(8), 2).unwrap_err();
        assert!(refused.to_string().contains("it holds 2 of 3"), "{refused}");
        stored.remove(&name);
        stored.admit(&name, 3).unwrap();
        stored.limit = None;
        assert!(stored.admit(&name, MAX_NAMES / length(&name)).is_ok());
        assert!(stored.admit(&name, MAX_NAMES / length(&name) + 1).is_err());
    }
}

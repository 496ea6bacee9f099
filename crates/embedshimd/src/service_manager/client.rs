//! [`ServiceManager`]: the daemon's client of the service manager, by the datagrams of
//! `sd_notify(3)`. Owns what is sent and what is known to be stored. Sends in order and never waits
//! for the manager to read, but where a method says so.

use std::ffi::OsString;
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use embedshim_core::failpoint;
use embedshim_core::fdstore::{FdName, FdStore, InheritedFds};
use embedshim_core::process::ProcessIdentity;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{SndBuf, SndBufForce};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use tracing::warn;

use super::message::Message;
use super::outgoing::Outgoing;
use super::store_usage::StoreUsage;

/// The bytes of datagrams that the kernel keeps for a manager that does not read.
const SEND_BUFFER: usize = 1024 * 1024;
/// How long the manager may take to handle everything that was sent, in milliseconds.
const BARRIER_LIMIT: u16 = 5_000;
/// How long the manager may take to answer how processes ended, in milliseconds.
const ANSWER_LIMIT: u16 = 30_000;
/// The most bytes that are read of an answer: more than the keeper ever writes.
const MAX_ANSWER: u64 = 16 * 1024;

/// How long a start may take from one part of it to the next. systemd counts the first from the
/// start of the process, by `TimeoutStartSec=`.
pub(crate) const START_LIMIT: Duration = Duration::from_secs(90);
/// The most often that the manager is told that a start goes on.
const START_NOTE: Duration = Duration::from_secs(1);

/// The connection to the service manager, and what its descriptor store holds.
#[derive(Debug)]
pub(crate) struct ServiceManager {
    outgoing: Outgoing,
    usage: Mutex<StoreUsage>,
    /// When the manager was last told that the start goes on.
    start_noted: Mutex<Instant>,
}

impl ServiceManager {
    /// The service manager at the address of `NOTIFY_SOCKET`: a path, or an abstract name after
    /// `@`. It stores at most `limit` descriptors, if that is known, and has stored the `inherited`
    /// ones. A keeper, unlike systemd, can end: this process then takes its place.
    pub(crate) fn connect(
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
        // Datagrams that are not read yet count, each with 1 KiB or so: as many as its queue takes.
        // It takes CAP_NET_ADMIN to have more than others.
        if setsockopt(&socket, SndBufForce, &SEND_BUFFER).is_err() {
            let _ = setsockopt(&socket, SndBuf, &SEND_BUFFER);
        }
        // A connected socket goes on working when the path is removed from the file system.
        match connect(&socket, &address) {
            // The keeper has ended since it started this process, which takes its place.
            Err(Errno::CONNREFUSED | Errno::NOENT) if is_keeper => {}
            connected => connected?,
        }
        let mut usage = StoreUsage::new(limit, is_keeper);
        usage.take_over(inherited)?;
        Ok(Self {
            outgoing: Outgoing::new(socket),
            usage: Mutex::new(usage),
            start_noted: Mutex::new(Instant::now()),
        })
    }

    fn send(&self, message: Message<'_>, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.outgoing.send(message.to_string(), descriptors)
    }

    /// Says that the daemon serves: units that are ordered after it start.
    pub(crate) fn notify_ready(&self) -> io::Result<()> {
        self.send(Message::Ready, &[])
    }

    /// Says that the daemon is alive. It has to be repeated within the watchdog's period.
    pub(crate) fn notify_alive(&self) -> io::Result<()> {
        self.send(Message::Alive, &[])
    }

    /// Says in a line what the daemon does, for `systemctl status`.
    pub(crate) fn notify_status(&self, text: &str) -> io::Result<()> {
        self.send(Message::Status(text), &[])
    }

    /// Says that the daemon leaves. Returns when the manager has handled everything that was sent;
    /// fails after [`BARRIER_LIMIT`].
    pub(crate) fn notify_stopping(&self) -> io::Result<()> {
        self.send(Message::Stopping, &[])?;
        let mut handled = self.barrier()?;
        let mut polled = [PollFd::new(handled.as_fd(), PollFlags::POLLIN)];
        if poll(&mut polled, PollTimeout::from(BARRIER_LIMIT))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        handled.read(&mut [0]).map(drop)
    }

    /// Asks the keeper to recreate its files in the state directory. systemd ignores the request:
    /// it has none there.
    pub(crate) fn request_keeper_files(&self) -> io::Result<()> {
        self.send(Message::RecreateFiles, &[])
    }

    /// A pipe that ends when the manager has handled everything that was sent before.
    pub(crate) fn barrier(&self) -> io::Result<PipeReader> {
        let (ours, theirs) = io::pipe()?;
        self.send(Message::Barrier, &[theirs.as_fd()])?;
        Ok(ours)
    }

    /// Removes what is stored under a name that is not an [`FdName`] of this version.
    pub(crate) fn remove_unknown(&self, name: &str) -> io::Result<()> {
        self.send(Message::Remove(name), &[])
    }

    /// Begins to take the keeper's place: from now on this process holds on to everything that is
    /// stored. False if it cannot, since it does not have all of that.
    pub(crate) fn begin_succession(&self) -> bool {
        self.usage().begin_succession()
    }

    /// This process's duplicates of everything that is stored, each with its name.
    pub(crate) fn take_duplicates(&self) -> Vec<(String, OwnedFd)> {
        let duplicates = self.usage().take_duplicates();
        let named = |(name, descriptors): (FdName, Vec<OwnedFd>)| {
            let name = name.to_string();
            descriptors
                .into_iter()
                .map(move |descriptor| (name.clone(), descriptor))
        };
        duplicates.into_iter().flat_map(named).collect()
    }

    /// How many descriptors the manager stores, and how many it stores at most, if it says so.
    pub(crate) fn stored(&self) -> (usize, Option<usize>) {
        self.usage().stored()
    }

    fn usage(&self) -> MutexGuard<'_, StoreUsage> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FdStore for ServiceManager {
    fn add(&self, name: &FdName, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut usage = self.usage();
        usage
            .check_room(name, descriptors.len())
            .map_err(io::Error::other)?;
        let duplicates = usage.duplicate(descriptors)?;
        failpoint::step("before FDSTORE");
        self.send(Message::Store(&name.to_string()), descriptors)?;
        usage.add(*name, descriptors.len(), duplicates);
        failpoint::step("after FDSTORE");
        Ok(())
    }

    fn remove(&self, name: &FdName) -> io::Result<()> {
        failpoint::step("before FDSTOREREMOVE");
        let mut usage = self.usage();
        let removed = self.send(Message::Remove(&name.to_string()), &[]);
        usage.remove(name);
        failpoint::step("after FDSTOREREMOVE");
        removed
    }

    fn is_settled(&self) -> bool {
        self.outgoing.is_settled()
    }

    fn start_goes_on(&self) {
        let now = Instant::now();
        let mut noted = self
            .start_noted
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if now.duration_since(*noted) < START_NOTE {
            return;
        }
        *noted = now;
        let microseconds = u64::try_from(START_LIMIT.as_micros()).unwrap_or(u64::MAX);
        if let Err(error) = self.send(Message::ExtendStart { microseconds }, &[]) {
            warn!(%error, "cannot notify the service manager: the start goes on");
        }
    }

    fn reap(&self, process: ProcessIdentity) -> io::Result<()> {
        let ProcessIdentity {
            pid, start_ticks, ..
        } = process;
        self.send(Message::Reap { pid, start_ticks }, &[])
    }

    fn reaped(&self, pid: i32) -> io::Result<Vec<(u64, i32)>> {
        let (ours, theirs) = io::pipe()?;
        self.send(Message::Reaped { pid }, &[theirs.as_fd()])?;
        drop(theirs);
        let mut polled = [PollFd::new(ours.as_fd(), PollFlags::POLLIN)];
        if poll(&mut polled, PollTimeout::from(ANSWER_LIMIT))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // The keeper writes all of it at once. systemd, which does not know the question, closes
        // the pipe.
        let mut text = String::new();
        ours.take(MAX_ANSWER).read_to_string(&mut text)?;
        let line = |line: &str| {
            let (start_ticks, status) = line.split_once(' ')?;
            Some((start_ticks.parse().ok()?, status.parse().ok()?))
        };
        Ok(text.lines().filter_map(line).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn a_start_that_goes_on_is_told_of_once_a_second_at_most() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let theirs = UnixDatagram::bind(&path).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let inherited = InheritedFds::default();
        let manager =
            ServiceManager::connect(&path.into_os_string(), None, &inherited, false).unwrap();
        *manager.start_noted.lock().unwrap() -= START_NOTE;
        let mut told = 0;
        let mut buffer = [0; 64];
        for _ in 0..10_000 {
            manager.start_goes_on();
            if let Ok(length) = theirs.recv(&mut buffer) {
                assert_eq!(&buffer[..length], b"EXTEND_TIMEOUT_USEC=90000000\n");
                told += 1;
            }
        }
        // A loaded machine takes longer than a second for this.
        assert!((1..100).contains(&told), "{told}");
    }
}

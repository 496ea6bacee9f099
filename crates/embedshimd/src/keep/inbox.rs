//! [`Inbox`]: the socket that `NOTIFY_SOCKET` names. Owns receiving, and that only the daemon is
//! listened to; [`crate::service_manager::message`] says what a datagram means.

use std::fs::{self, File};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, bind, setsockopt, socket, sockopt::PassCred,
};
use nix::sys::stat::{Mode, umask};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, UCred, recvmsg,
};
use rustix::process::Pid;

/// The longest datagram in bytes: no message of the protocol is half as long.
pub(super) const MAX_MESSAGE: usize = 1024;
/// The most descriptors of one datagram: `SCM_MAX_FD` of the kernel.
const MAX_DESCRIPTORS: usize = 253;
/// How many datagrams a new socket of this network namespace takes that are not read yet, 10 by the
/// kernel's default. What is in that queue outlives the daemon, also while the keeper does not run.
const QUEUE_LENGTH: &str = "/proc/sys/net/unix/max_dgram_qlen";
/// What systemd sets it to when a machine starts.
const ENOUGH: u32 = 512;
/// How often, and after what time, a keeper tries to be the only one that changes it.
const LOCK_ATTEMPTS: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(2);

/// The path of the socket.
pub(super) fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("keeper.sock")
}

/// The keeper's socket, bound to its path.
#[derive(Debug)]
pub(super) struct Inbox {
    pub(super) socket: OwnedFd,
}

/// One datagram, but for its bytes.
#[derive(Debug)]
pub(super) struct Received {
    /// How many bytes of the buffer it fills.
    pub(super) length: usize,
    /// The process that sent it, if the kernel says.
    pub(super) sender: Option<UCred>,
    pub(super) descriptors: Vec<OwnedFd>,
    /// It was longer than the buffer.
    pub(super) is_truncated: bool,
    /// Some of its descriptors are lost: this process may have no more.
    pub(super) lacks_descriptors: bool,
}

impl Inbox {
    /// Makes the socket, in the place of an old one: the caller holds the keeper's lock, so no
    /// other process listens there.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let fd = with_long_queue(|| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            socket(AddressFamily::Unix, SockType::Datagram, flags, None)
        })?;
        setsockopt(&fd, PassCred, &true)?;
        // The umask sets the mode of the file: with a chmod afterwards other users could connect
        // before.
        let before = umask(Mode::from_bits_truncate(0o177));
        let bound = UnixAddr::new(path).and_then(|address| bind(fd.as_raw_fd(), &address));
        umask(before);
        bound?;
        Ok(Self::from_inherited(fd))
    }

    /// The socket that a former keeper has made.
    pub(super) fn from_inherited(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Receives the next datagram; `None` if there is none.
    pub(super) fn receive(&self, buffer: &mut [u8; MAX_MESSAGE]) -> io::Result<Option<Received>> {
        let mut space = [MaybeUninit::uninit();
            rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS), ScmCredentials(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let mut slices = [IoSliceMut::new(buffer)];
        let received = match recvmsg(&self.socket, &mut slices, &mut ancillary, flags) {
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            received => received?,
        };
        let mut sender = None;
        let mut descriptors = Vec::new();
        for message in ancillary.drain() {
            match message {
                RecvAncillaryMessage::ScmRights(received) => descriptors.extend(received),
                RecvAncillaryMessage::ScmCredentials(credentials) => sender = Some(credentials),
                _ => {}
            }
        }
        Ok(Some(Received {
            length: received.bytes,
            sender,
            descriptors,
            is_truncated: received.flags.contains(ReturnFlags::TRUNC),
            lacks_descriptors: received.flags.contains(ReturnFlags::CTRUNC),
        }))
    }
}

/// Makes a socket whose queue is as long as systemd's. The kernel reads the length when the socket
/// is made, so the setting is restored at once. Where it cannot be changed, it stays as it is. Two
/// keepers that start together would restore it under each other: they take turns.
fn with_long_queue<T>(make: impl FnOnce() -> T) -> T {
    let turn = File::open(QUEUE_LENGTH).ok();
    if let Some(turn) = &turn {
        // Any user can have the lock, and keep it.
        for _ in 0..LOCK_ATTEMPTS {
            if turn.try_lock().is_ok() {
                break;
            }
            sleep(LOCK_PAUSE);
        }
    }
    let text = fs::read_to_string(QUEUE_LENGTH).unwrap_or_default();
    let length: Option<u32> = text.trim().parse().ok();
    let is_raised = length.is_some_and(|length| length < ENOUGH)
        && fs::write(QUEUE_LENGTH, ENOUGH.to_string()).is_ok();
    let socket = make();
    if is_raised {
        let _ = fs::write(QUEUE_LENGTH, text);
    }
    socket
}

impl Received {
    /// The daemon, if it has sent this datagram as a whole; otherwise why the datagram is ignored.
    pub(super) fn check_sender(&self, daemon: Option<Pid>) -> Result<Pid, String> {
        let sender = self.sender.ok_or("it has no sender")?;
        let own = nix::unistd::geteuid().as_raw();
        if sender.uid.as_raw() != own {
            return Err(format!("user {} sent it", sender.uid.as_raw()));
        }
        let process = sender.pid.as_raw_nonzero();
        let Some(daemon) = daemon else {
            return Err(format!("process {process} sent it, and no daemon runs"));
        };
        if sender.pid != daemon {
            return Err(format!(
                "process {process} sent it, which is not the daemon"
            ));
        }
        if self.is_truncated {
            return Err(format!("it is longer than {MAX_MESSAGE} bytes"));
        }
        Ok(daemon)
    }
}

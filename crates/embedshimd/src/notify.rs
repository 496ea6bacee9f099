//! [`Manager`]: whoever started the daemon and keeps its descriptors, systemd or `embedshimd keep`, by way of the datagrams of
//! `sd_notify(3)`. Owns their form and their limits of time; what is kept under which name is the callers'.

use std::ffi::OsString;
use std::io::{self, IoSlice, PipeReader, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use embedshim_core::descriptor::{DescriptorName, DescriptorStore};
use embedshim_core::failpoint;
use embedshim_core::process::ProcessIdentity;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, sendmsg, socket_with,
};
use tracing::{error, warn};

use crate::keep::REAP;

/// A queue of datagrams is short (`net.unix.max_dgram_qlen`), and a manager that is stopped does not empty it.
const SEND_LIMIT: Duration = Duration::from_secs(1);
/// How long the manager may take to have handled everything.
const BARRIER_LIMIT: u16 = 5_000;

/// The manager's socket.
#[derive(Debug)]
pub(crate) struct Manager {
    /// Connected, so that it goes on when somebody removes the address from the file system.
    socket: OwnedFd,
    is_lost: AtomicBool,
    /// It did not empty its queue in time: until it does, nobody waits for it again.
    is_slow: AtomicBool,
}

impl Manager {
    /// The one that `NOTIFY_SOCKET` names: a path, or an abstract name after `@`.
    pub(crate) fn new(address: &OsString) -> io::Result<Self> {
        let bytes = address.as_bytes();
        let address = match bytes.strip_prefix(b"@") {
            Some(name) => SocketAddrUnix::new_abstract_name(name)?,
            None => SocketAddrUnix::new(bytes)?,
        };
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        set_socket_timeout(&socket, Timeout::Send, Some(SEND_LIMIT))?;
        connect(&socket, &address)?;
        Ok(Self {
            socket,
            is_lost: AtomicBool::new(false),
            is_slow: AtomicBool::new(false),
        })
    }

    /// We serve: whoever waited for us can go on.
    pub(crate) fn ready(&self) -> io::Result<()> {
        self.send("READY=1\n", &[])
    }

    /// We are about to leave. Returns when everything that was ever sent is handled, or after a while.
    pub(crate) fn stopping(&self) -> io::Result<()> {
        self.send("STOPPING=1\n", &[])?;
        let (mut ours, theirs) = io::pipe()?;
        self.send("BARRIER=1\n", &[theirs.as_fd()])?;
        drop(theirs);
        wait_for_end(&mut ours)
    }

    /// Closes what is kept under a name that says nothing to us.
    pub(crate) fn forget_text(&self, name: &str) -> io::Result<()> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}\n"), &[])
    }

    fn send(&self, text: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors))
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bytes = [IoSlice::new(text.as_bytes())];
        let mut flags = SendFlags::NOSIGNAL;
        if self.is_slow.load(Ordering::Relaxed) {
            flags |= SendFlags::DONTWAIT;
        }
        let sent =
            rustix::io::retry_on_intr(|| sendmsg(&self.socket, &bytes, &mut ancillary, flags));
        let is_full = sent == Err(rustix::io::Errno::AGAIN);
        if is_full && !self.is_slow.load(Ordering::Relaxed) {
            warn!("whoever keeps our connections does not read what we send: is it stopped?");
        }
        self.is_slow.store(is_full, Ordering::Relaxed);
        if let Err(rustix::io::Errno::CONNREFUSED) = sent
            && !self.is_lost.swap(true, Ordering::Relaxed)
        {
            error!(
                "the keeper has ended: nobody starts this daemon again, and with it ends every connection of containerd, which then \
                 destroys its containers. Stop containerd before this daemon"
            );
        }
        Ok(sent.map(drop)?)
    }
}

impl DescriptorStore for Manager {
    fn keep(&self, name: &DescriptorName, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        failpoint::step("before FDSTORE");
        // Kept when its peer has left too: who has to know that is our successor.
        let kept = self.send(
            &format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0\n"),
            &[descriptor],
        );
        failpoint::step("after FDSTORE");
        kept
    }

    fn forget(&self, name: &DescriptorName) -> io::Result<()> {
        failpoint::step("before FDSTOREREMOVE");
        let forgotten = self.forget_text(&name.to_string());
        failpoint::step("after FDSTOREREMOVE");
        forgotten
    }

    fn reap(&self, process: ProcessIdentity) -> io::Result<()> {
        let (pid, start_ticks) = (process.pid, process.start_ticks);
        self.send(&format!("{REAP}={pid} {start_ticks}\n"), &[])
    }
}

fn wait_for_end(pipe: &mut PipeReader) -> io::Result<()> {
    let mut polled = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
    if poll(&mut polled, PollTimeout::from(BARRIER_LIMIT))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    pipe.read(&mut [0]).map(drop)
}

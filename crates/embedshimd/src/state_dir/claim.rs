//! [`Claim`]: the name that one daemon and one keeper of a state directory have in the kernel,
//! beside their lock files. The directory with the lock files can be removed, by a clean-up of
//! `/run` for example, and be made again: the name, an abstract socket, lasts as long as its
//! process (invariant 18).
//!
//! Any local user, and any container with the host's network, can take such a name first. The claim
//! then prevents nothing, and the lock files remain: only a name that an `embedshimd` of the host's
//! root has is a reason to refuse a start.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use embedshim_core::process::{HostRoot, Process};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen,
    socket, sockopt::PeerCredentials,
};
use tracing::warn;

/// The program that claims the state directory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Role {
    Daemon,
    Keeper,
}

/// The name of a state directory in the kernel, taken until this value is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    /// `None`: the name could not be taken, and only the lock files protect the directory.
    _socket: Option<OwnedFd>,
}

impl Claim {
    /// A claim without a name: only the lock files protect the directory.
    pub(crate) fn none() -> Self {
        Self { _socket: None }
    }

    /// Takes the name of a state directory; `None` if another `embedshimd` has it.
    pub(crate) fn take(state_dir: &Path, role: Role) -> Option<Self> {
        match try_take(state_dir, role) {
            Ok(Taken::Ours(socket)) => Some(Self {
                _socket: Some(socket),
            }),
            Ok(Taken::Theirs) => None,
            // It says no more than the lock, which that process has, too.
            Ok(Taken::Killed) => Some(Self::none()),
            Ok(Taken::Strangers(pid)) => {
                warn!(
                    state_dir = %state_dir.display(),
                    pid,
                    "cannot claim the state directory: another program has its abstract socket"
                );
                Some(Self::none())
            }
            Err(error) => {
                warn!(state_dir = %state_dir.display(), %error, "cannot claim the state directory");
                Some(Self::none())
            }
        }
    }
}

enum Taken {
    Ours(OwnedFd),
    Theirs,
    /// An `embedshimd` that was killed has it, and is held up in its end.
    Killed,
    Strangers(i32),
}

fn try_take(state_dir: &Path, role: Role) -> io::Result<Taken> {
    let address = address(state_dir, role)?;
    let new = || {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
    };
    let ours = new()?;
    match bind(ours.as_raw_fd(), &address) {
        // It listens, so that others learn which process has it. Nothing accepts: each connection
        // takes a place in the queue, and when that is full the name prevents nothing.
        Ok(()) => {
            listen(&ours, Backlog::MAXCONN)?;
            return Ok(Taken::Ours(ours));
        }
        Err(Errno::EADDRINUSE) => {}
        Err(errno) => return Err(errno.into()),
    }
    let other = new()?;
    match connect(other.as_raw_fd(), &address) {
        Ok(()) => {
            let pid = getsockopt(&other, PeerCredentials)?.pid();
            let process = Process::open(pid);
            Ok(
                if process.is_ok_and(|process| process.is_held_up_in_its_end()) {
                    Taken::Killed
                } else if is_embedshimd(pid) {
                    Taken::Theirs
                } else {
                    Taken::Strangers(pid)
                },
            )
        }
        Err(errno) => Err(errno.into()),
    }
}

/// Whether a process is an `embedshimd` of the host's root. `SO_PEERCRED` names the process that
/// made the socket, which may have ended: so the name of the process is compared, too.
fn is_embedshimd(pid: i32) -> bool {
    let name = |process: &str| std::fs::read(format!("/proc/{process}/comm")).ok();
    let is_ours = name("self").is_some_and(|ours| name(&pid.to_string()) == Some(ours));
    is_ours && HostRoot::find().is_some_and(|root| root.owns(pid))
}

/// The abstract address: a prefix for the role, and the path of the state directory. It fits since
/// it is shorter than the paths of the sockets in the directory, which are checked.
fn address(state_dir: &Path, role: Role) -> io::Result<UnixAddr> {
    let state_dir = std::path::absolute(state_dir)?;
    let role: &[u8] = match role {
        Role::Daemon => b"es-d",
        Role::Keeper => b"es-k",
    };
    let name = [role, state_dir.as_os_str().as_bytes()].concat();
    Ok(UnixAddr::new_abstract(&name)?)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_name_is_taken_once_until_its_process_ends() {
        let directory = tempfile::tempdir().unwrap();
        let claim = Claim::take(directory.path(), Role::Daemon).unwrap();
        for _ in 0..100 {
            assert!(Claim::take(directory.path(), Role::Daemon).is_none());
        }
        assert!(Claim::take(directory.path(), Role::Keeper).is_some());
        // The directory and its identity do not matter.
        let path = directory.path().to_owned();
        drop(directory);
        assert!(Claim::take(&path, Role::Daemon).is_none());
        drop(claim);
        // A child of another test has it until it executes.
        let deadline = Instant::now() + Duration::from_secs(30);
        while Claim::take(&path, Role::Daemon).is_none() {
            assert!(Instant::now() < deadline, "it is still taken");
        }
    }
}

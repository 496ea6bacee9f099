//! [`Claim`]: the name that one daemon and one keeper of a state directory have in the kernel, beside
//! their lock files. Somebody can remove the directory with the locks, by a clean-up of `/run` say,
//! and make another one: the name, an abstract socket, lasts as long as its process.
//!
//! Any local user can take such a name before us. It then prevents nothing, and the lock files
//! remain; so a name of another user's is warned of, and no reason to refuse.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen,
    socket, sockopt::PeerCredentials,
};
use tracing::warn;

/// Whose name it is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Role {
    Daemon,
    Keeper,
}

/// Holds the name until it is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    /// `None`: the name cannot be had, and the lock files have to do.
    _socket: Option<OwnedFd>,
}

impl Claim {
    /// Takes the name; `None` if another process of our user has it.
    pub(crate) fn take(state_dir: &Path, role: Role) -> Option<Self> {
        match try_take(state_dir, role) {
            Ok(Taken::Ours(socket)) => Some(Self {
                _socket: Some(socket),
            }),
            Ok(Taken::Theirs) => None,
            Ok(Taken::Strangers(uid)) => {
                warn!(state_dir = %state_dir.display(), uid, "a process of another user has taken the name of this state directory");
                Some(Self { _socket: None })
            }
            Err(error) => {
                warn!(state_dir = %state_dir.display(), %error, "the name of this state directory cannot be taken");
                Some(Self { _socket: None })
            }
        }
    }
}

enum Taken {
    Ours(OwnedFd),
    Theirs,
    Strangers(u32),
}

fn try_take(state_dir: &Path, role: Role) -> io::Result<Taken> {
    let address = address(state_dir, role)?;
    let new = || {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
    };
    let ours = new()?;
    match bind(ours.as_raw_fd(), &address) {
        // Listening, so that others learn who has it.
        Ok(()) => {
            listen(&ours, Backlog::new(1)?)?;
            return Ok(Taken::Ours(ours));
        }
        Err(Errno::EADDRINUSE) => {}
        Err(errno) => return Err(errno.into()),
    }
    let other = new()?;
    match connect(other.as_raw_fd(), &address) {
        Ok(()) => {
            let uid = getsockopt(&other, PeerCredentials)?.uid();
            let own = nix::unistd::geteuid().as_raw();
            Ok(if uid == own {
                Taken::Theirs
            } else {
                Taken::Strangers(uid)
            })
        }
        // Its queue is full: it is there.
        Err(Errno::EAGAIN) => Ok(Taken::Theirs),
        Err(errno) => Err(errno.into()),
    }
}

/// Shorter than the paths of the sockets in the directory, which are checked.
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
        assert!(Claim::take(directory.path(), Role::Daemon).is_none());
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

//! The listening socket: one path, one daemon. Never takes it from a daemon that still answers.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen as listen_on, socket,
};
use nix::sys::stat::{Mode, umask};
use tokio::net::UnixListener;

/// containerd connects once for every container when it starts, and Go takes a full backlog for a dead shim
/// (EAGAIN at connect), so we ask for as much as the kernel gives (`net.core.somaxconn`, 4096).
const BACKLOG: i32 = 4096;

/// Listens on `path`, readable by its owner only. A socket that nobody listens on any more is replaced; with one that
/// answers it is an error (`AddrInUse`). Needs a tokio runtime.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if path.symlink_metadata().is_ok() {
        if UnixStream::connect(path).is_ok() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        std::fs::remove_file(path)?;
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // The mode of a socket file comes from the umask alone: a chmod afterwards would leave a moment for others.
    let before = umask(Mode::from_bits_truncate(0o177));
    let bound = UnixAddr::new(path)
        .and_then(|address| bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &address));
    umask(before);
    bound?;
    listen_on(&fd, Backlog::new(BACKLOG)?)?;
    UnixListener::from_std(fd.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = listen(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(listen(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(first);
        listen(&path).unwrap();
    }
}

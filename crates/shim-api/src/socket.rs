//! The listening socket: one path, one daemon. Never takes the path from a daemon that still
//! listens.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use embedshim_core::fdstore::Listener;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt,
    listen as listen_on, socket, sockopt::AcceptConn,
};
use nix::sys::stat::{Mode, umask};

/// How many connections can wait to be accepted. containerd connects once for every container when
/// it starts, and takes a full backlog (EAGAIN at connect) for a dead shim, so this is as much as
/// the kernel gives (`net.core.somaxconn`).
const BACKLOG: i32 = 4096;

/// Listens on `path`, with access for its owner only. A socket on which no process listens is
/// replaced; if one does, it is an error (`AddrInUse`). Needs a tokio runtime.
pub fn listen(path: &Path) -> io::Result<Listener> {
    if UnixStream::connect(path).is_ok() {
        return Err(io::ErrorKind::AddrInUse.into());
    }
    Listener::new(replace(path)?)
}

/// Listens on `path`, with access for its owner only, in the place of what is there: for a caller
/// that knows that no other process listens. The listener does not block.
pub fn replace(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // The mode of a socket's file comes from the umask alone: a chmod afterwards would leave a
    // moment for others.
    let before = umask(Mode::from_bits_truncate(0o177));
    let bound = UnixAddr::new(path)
        .and_then(|address| bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &address));
    umask(before);
    bound?;
    listen_on(&fd, Backlog::new(BACKLOG)?)?;
    Ok(fd.into())
}

/// Goes on with a listener that a predecessor or systemd has created: it must be that of `path`.
/// Needs a tokio runtime.
pub fn resume(listener: OwnedFd, path: &Path) -> io::Result<Listener> {
    if !getsockopt(&listener, AcceptConn)? {
        return Err(io::Error::other("the socket does not listen"));
    }
    let listener = UnixListener::from(listener);
    let own = listener.local_addr()?;
    if own.as_pathname() != Some(path) || !answers(path) {
        return Err(io::Error::other(format!(
            "the socket is not that of {}: {own:?}",
            path.display()
        )));
    }
    Listener::new(listener)
}

/// Whether a socket listens at this path. The file can be that of a daemon that has created the
/// socket again and died before it stored it. A listener gets a connection that has ended.
fn answers(path: &Path) -> bool {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let connected = socket(AddressFamily::Unix, SockType::Stream, flags, None)
        .and_then(|fd| connect(std::os::fd::AsRawFd::as_raw_fd(&fd), &UnixAddr::new(path)?));
    // EAGAIN: the backlog is full, so there is a listener.
    matches!(connected, Ok(()) | Err(Errno::EAGAIN))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
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

    #[tokio::test]
    async fn a_listener_of_another_path_is_not_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("s"), dir.path().join("o"));
        let kept = |listener: &Listener| listener.as_fd().try_clone_to_owned().unwrap();
        let first = listen(&path).unwrap();
        resume(kept(&first), &path).unwrap();
        resume(kept(&first), &other).unwrap_err();
        let stream = UnixStream::connect(&path).unwrap();
        resume(stream.into(), &path).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        resume(kept(&first), &path).unwrap_err();
        // Made again by a daemon that died before it was stored.
        drop(UnixListener::bind(&path).unwrap());
        resume(kept(&first), &path).unwrap_err();
    }
}

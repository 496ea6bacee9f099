//! [`ConsoleSocket`]: how an OCI runtime hands over the master of a terminal. Owns the socket and
//! its file; what flows through the terminal is `flow`'s.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::warn;

use super::StdioError;
use super::non_blocking::set_non_blocking;
use crate::fdstore::{self, FdRole, Listener, ProcessFds, StreamFd};
use crate::sys;

/// The directory of the sockets, below the state directory. Short: a socket's path may have 107
/// bytes.
const DIRECTORY: &str = "tty";

/// What is in the set until the terminal is.
const ROLES: &[FdRole] = &[FdRole::Console, FdRole::ConsoleConnection];

/// The socket over which an OCI runtime sends the master of a terminal (`--console-socket`).
#[derive(Debug)]
pub(crate) struct ConsoleSocket {
    listener: Listener,
    path: PathBuf,
    fds: ProcessFds,
}

impl ConsoleSocket {
    /// Listens below the state directory. Needs a tokio runtime. Stored, it takes a terminal also
    /// while no daemon is there.
    pub(crate) fn bind(state_dir: &Path, fds: &ProcessFds) -> Result<Self, StdioError> {
        let failed = |source| StdioError::Console {
            doing: "listen for a terminal",
            source,
        };
        let directory = state_dir.join(DIRECTORY);
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(failed)?;
        let path = directory.join(file_name(fds));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).map_err(failed)?;
        let stored = listener.try_clone().map_err(failed)?;
        let socket = Self::with(listener, path, fds).map_err(failed)?;
        fds.insert([(FdRole::Console, StreamFd::new(stored))])
            .map_err(|source| StdioError::NotStored { source })?;
        Ok(socket)
    }

    /// The one that a predecessor has left, if its socket is in the set.
    pub(crate) fn resume(fds: &ProcessFds) -> Option<io::Result<Self>> {
        let stored = fds.get(FdRole::Console)?;
        let resumed = stored.as_fd().try_clone_to_owned().and_then(|listener| {
            let listener = UnixListener::from(listener);
            let address = listener.local_addr()?;
            let path = address.as_pathname().unwrap_or(Path::new("")).to_owned();
            Self::with(listener, path, fds)
        });
        Some(resumed)
    }

    fn with(listener: UnixListener, path: PathBuf, fds: &ProcessFds) -> io::Result<Self> {
        Ok(Self {
            listener: Listener::new(listener)?,
            path,
            fds: fds.clone(),
        })
    }

    /// What to tell the runtime.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Receives the master and puts it into the set. This socket is given up.
    pub(crate) async fn accept(self, limit: Duration) -> Result<(), StdioError> {
        let failed = |source| StdioError::Console {
            doing: "receive a terminal",
            source,
        };
        let received = async {
            let connection = self.connection().await?;
            let connection = sys::register_stream(connection, Interest::READABLE)?;
            receive(&connection).await
        };
        let master = tokio::time::timeout(limit, received)
            .await
            .map_err(|_| StdioError::NoConsole(limit))?;
        let master = master.map_err(failed)?;
        if !nix::unistd::isatty(&master).unwrap_or(false) {
            return Err(failed(io::Error::other(
                "what the OCI runtime sent is not a terminal",
            )));
        }
        set_non_blocking(&master).map_err(failed)?;
        self.fds
            .insert([(FdRole::Terminal, StreamFd::new(master))])
            .map_err(|source| StdioError::NotStored { source })?;
        self.fds.remove(ROLES);
        Ok(())
    }

    /// The connection over which the terminal comes, or has come. The runtime does not wait for its
    /// end, so it is stored in the step that accepts it, and what it holds stays in it until the
    /// terminal is stored.
    async fn connection(&self) -> io::Result<StreamFd> {
        if let Some(accepted) = self.fds.get(FdRole::ConsoleConnection) {
            return Ok(accepted);
        }
        loop {
            let fds = self.fds.clone();
            let waiting = self.listener.readable().await?;
            if let Some(accepted) = waiting
                .accept(move |listener| accept(listener, &fds))
                .await?
            {
                return Ok(accepted);
            }
        }
    }
}

fn accept(listener: BorrowedFd<'_>, fds: &ProcessFds) -> io::Result<StreamFd> {
    if fds.is_stored() {
        return fds.accept_and_insert(FdRole::ConsoleConnection, listener)?;
    }
    fdstore::accept(listener).map(StreamFd::new)
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        self.fds.remove(ROLES);
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One descriptor in one message, as runc's `SendFd` writes it. The message stays where it is.
async fn receive(connection: &AsyncFd<StreamFd>) -> io::Result<OwnedFd> {
    connection
        .async_io(Interest::READABLE, |connection| {
            let mut name = [0; 4096];
            let (_, received) = fdstore::peek(connection.as_fd(), &mut name)?;
            received
                .into_iter()
                .next()
                .ok_or_else(|| io::Error::other("the message holds no descriptor"))
        })
        .await
}

/// Removes the sockets that creations of earlier daemons have left. Those of `in_use` stay. Blocks
/// on the file system.
pub(crate) fn remove_abandoned(state_dir: &Path, in_use: &[ProcessFds]) {
    let names: Vec<String> = in_use.iter().map(file_name).collect();
    let entries = std::fs::read_dir(state_dir.join(DIRECTORY));
    for entry in entries.into_iter().flatten().flatten() {
        if names.iter().any(|name| entry.file_name() == name.as_str()) {
            continue;
        }
        if let Err(error) = std::fs::remove_file(entry.path()) {
            warn!(path = %entry.path().display(), %error, "cannot remove the socket of a terminal whose runtime has ended");
        }
    }
}

/// Shorter than in decimal, and no other process's.
fn file_name(fds: &ProcessFds) -> String {
    format!("{:x}", fds.number())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::sync::Arc;

    use nix::pty::openpty;

    use super::*;
    use crate::fdstore::NoFdStore;

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn sockets_of_creations_that_were_cut_short_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(DIRECTORY)).unwrap();
        let fds = [1, 2].map(|number| ProcessFds::new(Arc::new(NoFdStore), number));
        for fds in &fds {
            std::fs::write(dir.path().join(DIRECTORY).join(file_name(fds)), "").unwrap();
        }
        remove_abandoned(dir.path(), &fds[..1]);
        let left = std::fs::read_dir(dir.path().join(DIRECTORY)).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["1"]);
    }

    #[tokio::test]
    async fn a_console_socket_takes_terminals_only_and_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let set = ProcessFds::new(Arc::new(NoFdStore), 1);
        for (sent, accepted) in [
            (openpty(None, None).unwrap().master, true),
            (File::open("/dev/null").unwrap().into(), false),
        ] {
            let socket = ConsoleSocket::bind(dir.path(), &set).unwrap();
            let path = socket.path().to_owned();
            let sender = std::os::unix::net::UnixStream::connect(&path).unwrap();
            let fds = [sent.as_raw_fd()];
            let rights = [nix::sys::socket::ControlMessage::ScmRights(&fds)];
            let name = [io::IoSlice::new(b"/dev/ptmx")];
            nix::sys::socket::sendmsg::<()>(
                sender.as_raw_fd(),
                &name,
                &rights,
                nix::sys::socket::MsgFlags::empty(),
                None,
            )
            .unwrap();
            assert_eq!(socket.accept(LIMIT).await.is_ok(), accepted);
            assert_eq!(set.get(FdRole::Terminal).is_some(), accepted);
            set.remove_all();
            assert!(!path.exists());
        }
        let socket = ConsoleSocket::bind(dir.path(), &set).unwrap();
        let late = socket.accept(Duration::from_millis(10)).await.unwrap_err();
        assert!(matches!(late, StdioError::NoConsole(_)), "{late}");
    }
}

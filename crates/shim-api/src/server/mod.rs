//! [`Server`]: ttrpc, as Go's server speaks it, over connections that outlive this process. Owns
//! accepting, and that every connection is stored; what a call means is its [`Handler`]'s.
//!
//! containerd opens one connection for each container and never closes it, so an idle connection is
//! one small tokio task and no buffer. It destroys the container of a connection that is lost, so
//! every connection is in the descriptor store before its first byte is read, and every request is
//! in a journal until it is answered ([`Keeping`]).

mod answer;
mod calls;
mod connection;
mod frame_reader;
mod handler;
mod journal;
mod peek_off;
mod state;
mod stored;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use embedshim_core::fdstore::FdStore;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use answer::StoredAnswer;
use connection::{Connection, Inherited};
pub use handler::{Call, Creation, Handler, Outcomes, Session};
use journal::Journal;
use state::ServerState;
use stored::StoredConnections;

/// After a failed accept: descriptors or memory are short, and the next attempt would fail at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How often [`Server::note_again`] looks whether all connections have their journals again.
const LOOK: Duration = Duration::from_millis(5);

/// What makes connections outlive this process.
#[derive(Debug)]
pub struct Keeping {
    /// The descriptor store, which holds their sockets.
    pub store: Arc<dyn FdStore>,
    /// A directory for their journals alone, on tmpfs.
    pub directory: PathBuf,
}

/// A ttrpc server.
#[derive(Debug)]
pub struct Server<H> {
    handler: Arc<H>,
    /// None if its connections end with this process.
    stored: Option<StoredConnections>,
    state: watch::Sender<ServerState>,
}

impl<H: Handler> Server<H> {
    /// A server whose calls `handler` answers, and whose connections end with this process.
    pub fn new(handler: H) -> Self {
        Self {
            handler: Arc::new(handler),
            stored: None,
            state: watch::Sender::default(),
        }
    }

    /// A server whose calls `handler` answers, and whose connections outlive this process. Blocks
    /// on the file system.
    pub fn keeping(handler: H, keeping: Keeping) -> io::Result<Self> {
        let stored = StoredConnections::open(keeping.store, keeping.directory)?;
        Ok(Self {
            stored: Some(stored),
            ..Self::new(handler)
        })
    }

    /// Goes on with the connections that another daemon has left: for each its number, its socket,
    /// and the answer that was being sent. Answers what is not answered. Needs a tokio runtime.
    pub fn resume(&self, connections: Vec<(u64, OwnedFd, Option<OwnedFd>)>) {
        let Some(stored) = &self.stored else { return };
        let numbers: Vec<u64> = connections.iter().map(|(number, ..)| *number).collect();
        stored.journals.keep_only(&numbers);
        info!(connections = numbers.len(), "connections resumed");
        for (number, descriptor, answer) in connections {
            stored.numbers.skip(number);
            let (journal, recovered) = stored.journals.resume(number);
            let inherited = Inherited {
                answers: stored.answers(number),
                answer: answer.map(StoredAnswer::inherited),
                journal,
                recovered,
            };
            let resumed =
                nonblocking(descriptor).and_then(|stream| Connection::resume(stream, inherited));
            match resumed {
                Ok(connection) => self.spawn(connection, Some(number)),
                Err(error) => {
                    warn!(connection = number, %error, "connection: cannot be resumed: it is closed");
                    stored.remove(number);
                }
            }
        }
    }

    /// Accepts connections until `until` completes, and can be called again with another listener.
    /// The connections end with the runtime, or when their peers close them.
    pub async fn serve<T>(&self, listener: &UnixListener, until: impl Future<Output = T>) -> T {
        tokio::pin!(until);
        loop {
            tokio::select! {
                reason = &mut until => return reason,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => self.admit(stream),
                    Err(error) => {
                        warn!(%error, "connection: cannot be accepted: trying again");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }

    /// Stops reading: from here on only what was read is answered.
    pub fn stop(&self) {
        self.state.send_modify(|state| state.is_stopping = true);
    }

    /// Creates the journals again after another program has removed them. Returns when every
    /// connection has its own, which takes as long as a connection waits for its client to read, or
    /// at the limit.
    pub async fn note_again(&self, limit: Duration) -> io::Result<()> {
        let Some(stored) = &self.stored else {
            return Ok(());
        };
        stored.journals.create_directory()?;
        let mut losses = 0;
        self.state.send_modify(|state| {
            state.journal_losses += 1;
            losses = state.journal_losses;
        });
        let deadline = Instant::now() + limit;
        while !stored.recreated.are_all_after(losses) {
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    /// Serves a connection that was just accepted. It is stored before its first byte is read
    /// (invariant 14).
    fn admit(&self, stream: UnixStream) {
        if let Err(error) = check_peer(&stream) {
            warn!(%error, "connection: refused");
            return;
        }
        let session = Session::default();
        let (answers, journal) = match &self.stored {
            None => (None, Journal::none()),
            Some(stored) => {
                let number = stored.numbers.draw();
                if let Err(error) = stored.store(number, &stream) {
                    warn!(connection = number, %error, "connection: cannot be stored: it ends with this daemon, and no container is created on it");
                    let _ = session.not_stored.set(error.to_string());
                }
                (Some(stored.answers(number)), stored.journals.begin(number))
            }
        };
        let number = answers.as_ref().map(|answers| answers.connection);
        self.spawn(Connection::new(stream, answers, journal, session), number);
    }

    fn spawn(&self, connection: Connection, number: Option<u64>) {
        let (handler, state) = (Arc::clone(&self.handler), self.state.subscribe());
        let stored = self.stored.as_ref().zip(number);
        let served = stored.map(|(stored, number)| {
            let losses = state.borrow().journal_losses;
            stored.serve(number, losses)
        });
        tokio::spawn(async move {
            let journal_after = served.as_ref().map(|served| served.journal_after.as_ref());
            if let Err(error) = connection.run(handler, state, journal_after).await {
                debug!(connection = number, %error, "connection: ended");
            }
            if let Some(served) = served {
                served.end();
            }
        });
    }
}

/// A socket that another daemon has left.
fn nonblocking(descriptor: OwnedFd) -> io::Result<UnixStream> {
    let stream = std::os::unix::net::UnixStream::from(descriptor);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// Refuses peers of another user, as Go's shims do (`UnixSocketRequireSameUser`).
fn check_peer(stream: &UnixStream) -> io::Result<()> {
    let peer = stream.peer_cred()?.uid();
    let own = nix::unistd::geteuid().as_raw();
    if peer == own {
        Ok(())
    } else {
        Err(io::Error::other(format!(
            "the peer is user {peer}, this daemon serves user {own} only"
        )))
    }
}

#[cfg(fuzzing)]
pub(crate) async fn converse<H: Handler>(stream: UnixStream, handler: Arc<H>) -> io::Result<()> {
    let (_running, state) = watch::channel(ServerState::default());
    Connection::new(stream, None, Journal::none(), Session::default())
        .run(handler, state, None)
        .await
}

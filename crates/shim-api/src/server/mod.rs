//! [`Server`]: ttrpc, as Go's server speaks it, over connections that outlive this process. Owns
//! accepting, and that every connection is stored; what a call means is its [`Handler`]'s.
//!
//! containerd opens one connection for each container and never closes it, so an idle connection is
//! one small tokio task and no buffer. It destroys the container of a connection that is lost, so
//! every connection is in the descriptor store before its first byte is read, and every request is
//! in a journal until it is answered ([`ConnectionStorage`]).

mod answer;
mod calls;
mod connection;
mod frame_reader;
mod handler;
mod journal;
mod outcomes;
mod peek_off;
mod state;
mod stored;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::Duration;

use embedshim_core::fdstore::{self, Listener, Waiting};
use nix::sys::socket::{MsgFlags, recv};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use answer::StoredAnswer;
use connection::{Connection, Inherited};
pub use handler::{Call, Creation, Handler, Session};
use journal::Journal;
pub use outcomes::Outcomes;
use state::ServerState;
pub use stored::ConnectionStorage;
use stored::StoredConnections;

/// How many connections are read again before those that were get to answer.
const RESUMED_AT_ONCE: usize = 8;
/// After a failed accept: descriptors or memory are short, and the next attempt would fail at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How often [`Server::recreate_journals`] looks whether all connections have their journals again.
const LOOK: Duration = Duration::from_millis(5);

/// A ttrpc server.
#[derive(Debug)]
pub struct Server<H> {
    handler: Arc<H>,
    /// None if its connections end with this process.
    stored: Option<StoredConnections>,
    state: watch::Sender<ServerState>,
    open: Arc<()>,
}

impl<H: Handler> Server<H> {
    /// A server whose calls `handler` answers, and whose connections end with this process.
    pub fn new(handler: H) -> Self {
        Self {
            handler: Arc::new(handler),
            stored: None,
            state: watch::Sender::default(),
            open: Arc::default(),
        }
    }

    /// A server whose calls `handler` answers, and whose connections outlive this process. Blocks
    /// on the file system.
    pub fn durable(handler: H, storage: ConnectionStorage) -> io::Result<Self> {
        let stored = StoredConnections::open(storage)?;
        Ok(Self {
            stored: Some(stored),
            ..Self::new(handler)
        })
    }

    /// Counts the connections that are open, from any thread.
    pub fn connections(&self) -> Connections {
        Connections(Arc::downgrade(&self.open))
    }

    /// Goes on with the connections that another daemon has left: for each its number, its socket,
    /// and the answer that was being sent. Answers what is not answered, on the first of them
    /// before the last is read. Needs a tokio runtime. Connections that were not reached when this
    /// is cancelled stay stored.
    pub async fn resume(&self, connections: Vec<(u64, OwnedFd, Option<OwnedFd>)>) {
        let Some(stored) = &self.stored else { return };
        let numbers = connections.iter().map(|(number, ..)| *number).collect();
        stored.journals.remove_all_but(&numbers);
        info!(connections = connections.len(), "connections resumed");
        // Stored, but still in the queue.
        let queued = stored.intake.first().unwrap_or_default();
        if queued.is_some_and(|(number, _)| numbers.contains(&number)) {
            stored.intake.drop_first();
        }
        for (number, ..) in &connections {
            stored.numbers.skip(*number);
        }
        for (position, (number, descriptor, answer)) in connections.into_iter().enumerate() {
            if position % RESUMED_AT_ONCE == 0 {
                yield_now().await;
            }
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
                    warn!(connection = number, %error, "connection: cannot resume it: it is closed");
                    stored.remove(number);
                }
            }
        }
    }

    /// Accepts connections until `until` completes, and can be called again with another listener.
    /// The connections end with the runtime, or when their peers close them.
    pub async fn serve<T>(&self, listener: &Listener, until: impl Future<Output = T>) -> T {
        tokio::pin!(until);
        loop {
            let waiting = tokio::select! {
                reason = &mut until => return reason,
                waiting = listener.readable() => waiting.map(Some),
                queued = self.is_queued() => queued.map(|()| None),
            };
            // Not to be cancelled: what is accepted is served.
            let mut accepted = match waiting {
                Ok(Some(waiting)) => self.accept(waiting).await,
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            if accepted.is_ok() {
                accepted = self.admit_queued().await;
            }
            if let Err(error) = accepted {
                warn!(%error, "connection: cannot accept one: trying again");
                sleep(ACCEPT_PAUSE).await;
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
    pub async fn recreate_journals(&self, limit: Duration) -> io::Result<()> {
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

    /// Accepts a connection. One that is to be stored goes into the queue first, in the step that
    /// accepts it.
    async fn accept(&self, waiting: Waiting<'_>) -> io::Result<()> {
        let Some(stored) = &self.stored else {
            if let Some(connection) = waiting.accept(fdstore::accept).await? {
                self.admit(None, connection, Ok(()))?;
            }
            return Ok(());
        };
        let number = stored.numbers.draw();
        match waiting.accept_into(&stored.intake, number).await? {
            Some(unqueued) => self.store_and_admit(stored, number, unqueued).await,
            None => Ok(()),
        }
    }

    /// Waits until a connection is in the queue.
    async fn is_queued(&self) -> io::Result<()> {
        match &self.stored {
            Some(stored) => stored.intake.readable().await,
            None => std::future::pending().await,
        }
    }

    /// Serves the connections that are in the queue, each stored before its first byte is read
    /// (invariant 14). One that another daemon has accepted may be among them.
    async fn admit_queued(&self) -> io::Result<()> {
        let Some(stored) = &self.stored else {
            return Ok(());
        };
        while let Some((number, connection)) = stored.intake.first()? {
            stored.numbers.skip(number);
            let admitted = self.store_and_admit(stored, number, connection).await;
            stored.intake.drop_first();
            admitted?;
        }
        Ok(())
    }

    async fn store_and_admit(
        &self,
        stored: &StoredConnections,
        number: u64,
        connection: OwnedFd,
    ) -> io::Result<()> {
        if has_hung_up(&connection) {
            // It only wanted to know whether a daemon listens, as launchers do.
            return Ok(());
        }
        let kept = stored.store(number, &connection);
        stored.settle().await;
        self.admit(Some(number), connection, kept)
    }

    /// Serves a connection. `kept` says whether it is stored, if it has a number.
    fn admit(
        &self,
        number: Option<u64>,
        connection: OwnedFd,
        kept: io::Result<()>,
    ) -> io::Result<()> {
        let stored = self.stored.as_ref().zip(number);
        let Some(stream) = welcome(connection)? else {
            if let Some((stored, number)) = stored {
                stored.remove(number);
            }
            return Ok(());
        };
        let session = Session::default();
        if let Err(error) = kept {
            warn!(connection = number, %error, "connection: cannot store it: it ends with this daemon, and no container is created on it");
            let _ = session.not_stored.set(error.to_string());
        }
        let (answers, journal) = match stored {
            Some((stored, number)) => {
                let journal = stored.journals.begin(number);
                (Some(stored.answers(number)), journal)
            }
            None => (None, Journal::none()),
        };
        self.spawn(Connection::new(stream, answers, journal, session), number);
        Ok(())
    }

    fn spawn(&self, mut connection: Connection, number: Option<u64>) {
        let (handler, mut state) = (Arc::clone(&self.handler), self.state.subscribe());
        let stored = self.stored.as_ref().zip(number);
        let served = stored.map(|(stored, number)| {
            let losses = state.borrow().journal_losses;
            stored.serve(number, losses)
        });
        let open = Arc::clone(&self.open);
        tokio::spawn(async move {
            let journal_after = served.as_ref().map(|served| served.journal_after.as_ref());
            // By reference: a future has room for each variable that it moves, and there are as
            // many of these as containers.
            let ended = connection.run(&handler, &mut state, journal_after).await;
            drop(connection);
            if let Err(error) = ended {
                debug!(connection = number, %error, "connection: ended");
            }
            if let Some(served) = served {
                served.end();
            }
            drop(open);
        });
    }
}

/// The number of a server's open connections.
#[derive(Clone, Debug)]
pub struct Connections(Weak<()>);

impl Connections {
    /// How many are open now.
    pub fn count(&self) -> usize {
        // One is the server's own.
        self.0.strong_count().saturating_sub(1)
    }
}

/// A socket for the reactor.
fn nonblocking(descriptor: OwnedFd) -> io::Result<UnixStream> {
    let stream = std::os::unix::net::UnixStream::from(descriptor);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// The stream of a connection whose peer is served.
fn welcome(connection: OwnedFd) -> io::Result<Option<UnixStream>> {
    let stream = nonblocking(connection)?;
    Ok(match check_peer(&stream) {
        Ok(()) => Some(stream),
        Err(error) => {
            warn!(%error, "connection: refusing a peer");
            None
        }
    })
}

/// Whether the client has closed a connection without having sent anything.
fn has_hung_up(connection: &OwnedFd) -> bool {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(connection.as_raw_fd(), &mut [0], flags) == Ok(0)
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
    let (_running, mut state) = watch::channel(ServerState::default());
    Connection::new(stream, None, Journal::none(), Session::default())
        .run(&handler, &mut state, None)
        .await
}

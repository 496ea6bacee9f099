//! [`Server`]: ttrpc over our own connections, with the manners of Go's server. Owns accepting and
//! framing, and that a connection outlives this process; what a call means is its [`Handler`]'s.
//!
//! containerd opens one connection for each container and never lets go of it, so an idle
//! connection is one small tokio task and no buffer. It destroys the container of a connection that
//! is lost, so every connection is kept by somebody else before its first byte is read, and what
//! was read is noted until it is answered ([`Keeping`]).

mod answer;
mod calls;
mod connection;
mod frame_reader;
mod handler;
mod journal;
mod peek_off;
mod state;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use embedshim_core::clock::Numbers;
use embedshim_core::failpoint;
use embedshim_core::fdstore::{FdName, FdStore};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tracing::{debug, info, warn};

use answer::{AnswerStore, StoredAnswer};
use connection::{Connection, Left};
pub use handler::{Call, Creation, Handler, Outcomes, Session};
use journal::{Journal, Journals};
use state::{Noted, ServerState};

/// After a failed accept: descriptors or memory are short, and the next attempt would fail at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How often to look whether all connections have written their journals again.
const LOOK: Duration = Duration::from_millis(5);

/// What makes connections outlive this process.
#[derive(Debug)]
pub struct Keeping {
    /// Who keeps them.
    pub store: Arc<dyn FdStore>,
    /// A directory of its own for what is read and not answered, on tmpfs.
    pub directory: PathBuf,
}

/// A ttrpc server.
#[derive(Debug)]
pub struct Server<H> {
    handler: Arc<H>,
    kept: Option<Kept>,
    course: watch::Sender<ServerState>,
}

#[derive(Debug)]
struct Kept {
    store: Arc<dyn FdStore>,
    journals: Journals,
    /// Of connections.
    numbers: Numbers,
    noted: Arc<Noted>,
}

impl<H: Handler> Server<H> {
    /// A server whose calls `handler` answers, and whose connections end with it.
    pub fn new(handler: H) -> Self {
        Self {
            handler: Arc::new(handler),
            kept: None,
            course: watch::Sender::default(),
        }
    }

    /// One whose connections do not. Blocks on the file system.
    pub fn keeping(handler: H, keeping: Keeping) -> io::Result<Self> {
        let kept = Kept {
            store: keeping.store,
            journals: Journals::open(keeping.directory)?,
            numbers: Numbers::default(),
            noted: Arc::default(),
        };
        Ok(Self {
            kept: Some(kept),
            ..Self::new(handler)
        })
    }

    /// Goes on with the connections that another daemon has left, and does what it owes them. Needs
    /// a tokio runtime.
    pub fn resume(&self, connections: Vec<(u64, OwnedFd, Option<OwnedFd>)>) {
        let Some(kept) = &self.kept else { return };
        let numbers: Vec<u64> = connections.iter().map(|(number, ..)| *number).collect();
        kept.journals.keep_only(&numbers);
        info!(connections = numbers.len(), "connections taken over");
        for (number, descriptor, answer) in connections {
            kept.numbers.skip(number);
            let (journal, owed) = kept.journals.resume(number);
            let left = Left {
                answers: kept.answers(number),
                answer: answer.map(StoredAnswer::inherited),
                journal,
                owed,
            };
            let connection =
                take_over(descriptor).and_then(|stream| Connection::resume(stream, left));
            match connection {
                Ok(connection) => self.spawn(connection, Some(number)),
                Err(error) => {
                    warn!(connection = number, %error, "cannot go on with a connection");
                    kept.forget(number);
                }
            }
        }
    }

    /// Accepts connections until `until` completes, and can be called again with another listener.
    /// The connections end with the runtime, or when their peers leave.
    pub async fn serve<T>(&self, listener: &UnixListener, until: impl Future<Output = T>) -> T {
        tokio::pin!(until);
        loop {
            tokio::select! {
                reason = &mut until => return reason,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => self.admit(stream),
                    Err(error) => {
                        warn!(%error, "cannot accept a connection; trying again");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }

    /// From here on nothing is read any more, but what was read is answered.
    pub fn stop(&self) {
        self.course.send_modify(|course| course.is_stopping = true);
    }

    /// The journals have been removed: every connection writes down again what it owes. Returns
    /// when all have, which takes as long as a connection waits for its client to read, or at the
    /// limit.
    pub async fn note_again(&self, limit: Duration) -> io::Result<()> {
        let Some(kept) = &self.kept else {
            return Ok(());
        };
        kept.journals.create_directory()?;
        let mut losses = 0;
        self.course.send_modify(|course| {
            course.losses += 1;
            losses = course.losses;
        });
        let deadline = tokio::time::Instant::now() + limit;
        while kept.noted.least().is_some_and(|noted| noted < losses) {
            if tokio::time::Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    fn admit(&self, stream: UnixStream) {
        if let Err(error) = check_peer(&stream) {
            warn!(%error, "connection refused");
            return;
        }
        let session = Session::default();
        let (answers, journal) = match &self.kept {
            None => (None, Journal::none()),
            Some(kept) => {
                let number = kept.numbers.draw();
                if let Err(error) = kept.keep(number, &stream) {
                    warn!(connection = number, %error, "connection is not stored: it ends with this daemon, and no container is created on it");
                    let _ = session.not_kept.set(error.to_string());
                }
                (Some(kept.answers(number)), kept.journals.begin(number))
            }
        };
        let number = answers.as_ref().map(|answers| answers.connection);
        self.spawn(Connection::new(stream, answers, journal, session), number);
    }

    fn spawn(&self, connection: Connection, number: Option<u64>) {
        let (handler, course) = (Arc::clone(&self.handler), self.course.subscribe());
        let kept = self.kept.as_ref().zip(number).map(|(kept, number)| {
            let losses = course.borrow().losses;
            let noted = kept.noted.enter(number, losses);
            (
                number,
                Arc::clone(&kept.store),
                Arc::clone(&kept.noted),
                noted,
            )
        });
        tokio::spawn(async move {
            let noted = kept.as_ref().map(|(.., noted)| Arc::clone(noted));
            if let Err(error) = connection.run(handler, course, noted.as_deref()).await {
                debug!(%error, "connection ended");
            }
            if let Some((number, store, all, _)) = kept {
                all.leave(number);
                forget(store.as_ref(), number);
            }
        });
    }
}

impl Kept {
    fn keep(&self, number: u64, stream: &UnixStream) -> io::Result<()> {
        failpoint::step("before a connection is kept");
        self.store
            .keep(&FdName::Connection(number), &[stream.as_fd()])
    }

    fn answers(&self, connection: u64) -> AnswerStore {
        AnswerStore {
            store: Arc::clone(&self.store),
            connection,
        }
    }

    fn forget(&self, number: u64) {
        forget(self.store.as_ref(), number);
    }
}

fn forget(store: &dyn FdStore, number: u64) {
    if let Err(error) = store.forget(&FdName::Connection(number)) {
        debug!(%error, connection = number, "a connection that has ended is still kept");
    }
}

/// A connection as it was left.
fn take_over(descriptor: OwnedFd) -> io::Result<UnixStream> {
    let stream = std::os::unix::net::UnixStream::from(descriptor);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

#[cfg(fuzzing)]
pub(crate) async fn converse<H: Handler>(stream: UnixStream, handler: Arc<H>) -> io::Result<()> {
    let (_running, course) = watch::channel(ServerState::default());
    Connection::new(stream, None, Journal::none(), Session::default())
        .run(handler, course, None)
        .await
}

/// Only our own user may speak to us, as with Go's shims (`UnixSocketRequireSameUser`).
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

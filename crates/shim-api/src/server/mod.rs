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
mod journal;
mod peek_off;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use embedshim_core::clock::Numbers;
use embedshim_core::failpoint;
use embedshim_core::fdstore::{FdName, FdStore};
use embedshim_core::id::{ContainerId, Namespace};
use embedshim_core::task::{BundleId, RequestId};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tracing::{debug, info, warn};
use ttrpc::Status;

use answer::{AnswerStore, StoredAnswer};
pub use calls::Outcomes;
use connection::{Connection, Left};
use journal::{Journal, Journals};

/// After a failed accept: descriptors or memory are short, and the next attempt would fail at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How often to look whether all connections have written their journals again.
const LOOK: Duration = Duration::from_millis(5);

/// One call, as it came off the wire.
#[derive(Clone, Debug)]
pub struct Call {
    /// Full name, such as `containerd.task.v2.Task`.
    pub service: String,
    /// Such as `Create`.
    pub method: String,
    /// The request message.
    pub payload: Vec<u8>,
    /// ttrpc's metadata, the first value of each key.
    pub metadata: HashMap<String, String>,
    /// Which request it is, if its connection is kept.
    pub request: Option<RequestId>,
    /// Another daemon took this call and died before it was answered: perhaps it is done, or half
    /// done.
    pub is_again: bool,
    /// Where an answer goes whose evidence is about to be removed, if its connection is kept.
    pub outcomes: Option<Outcomes>,
    /// The connection it came on.
    pub session: Arc<Session>,
}

/// What is remembered of a connection.
#[derive(Debug, Default)]
pub struct Session {
    /// The namespace of its calls, once one of them has told it. containerd uses a connection for
    /// one container only.
    pub namespace: OnceLock<Namespace>,
    /// The last `Create` of this connection, whatever it was answered.
    pub creation: Mutex<Option<Creation>>,
    /// A daemon before this one knew the namespace, and its note of it is damaged.
    pub is_namespace_lost: bool,
    /// Why it will be lost with this process though others are not. No container may depend on it.
    pub not_kept: OnceLock<String>,
}

/// What a container was to be created from. No container of another bundle is meant by the calls of
/// that connection, though it has the same id: two containerds can use one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Creation {
    /// The container's.
    pub id: ContainerId,
    /// Its bundle.
    pub bundle: BundleId,
}

impl Session {
    /// The last `Create`.
    pub fn creation(&self) -> MutexGuard<'_, Option<Creation>> {
        self.creation.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What answers calls.
///
/// A future is dropped when its caller has gone or its deadline has passed: what must not be left
/// half done has to run in a task of its own.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Answers one call with a message or with an error.
    async fn call(&self, call: Call) -> Result<Vec<u8>, Status>;
}

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
    course: watch::Sender<Course>,
}

/// What all connections have to know.
#[derive(Clone, Copy, Debug, Default)]
struct Course {
    /// Nothing is read any more.
    is_stopping: bool,
    /// How often the journals have been lost.
    losses: u32,
}

#[derive(Debug)]
struct Kept {
    store: Arc<dyn FdStore>,
    journals: Journals,
    /// Of connections.
    numbers: Numbers,
    noted: Arc<Noted>,
}

/// Up to which loss of the journals each connection has written its own again.
#[derive(Debug, Default)]
struct Noted(Mutex<HashMap<u64, Arc<AtomicU32>>>);

impl Noted {
    fn enter(&self, connection: u64, losses: u32) -> Arc<AtomicU32> {
        let entry = Arc::new(AtomicU32::new(losses));
        self.all().insert(connection, Arc::clone(&entry));
        entry
    }

    fn leave(&self, connection: u64) {
        self.all().remove(&connection);
    }

    fn least(&self) -> Option<u32> {
        let all = self.all();
        all.values()
            .map(|noted| noted.load(Ordering::Acquire))
            .min()
    }

    fn all(&self) -> MutexGuard<'_, HashMap<u64, Arc<AtomicU32>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
        kept.journals.make()?;
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
    let (_running, course) = watch::channel(Course::default());
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

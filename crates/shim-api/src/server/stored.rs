//! [`StoredConnections`]: what makes connections outlive this process: the descriptor store, which
//! holds their sockets, and their journals. Owns their numbers, which no successor gives again.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use embedshim_core::clock::Numbers;
use embedshim_core::fdstore::{self, FdName, FdStore, Intake};
use tracing::debug;

use super::answer::AnswerStore;
use super::journal::Journals;
use super::state::RecreatedJournals;

/// Where connections are stored, so that they outlive this process.
#[derive(Debug)]
pub struct ConnectionStorage {
    /// The descriptor store, which holds their sockets.
    pub store: Arc<dyn FdStore>,
    /// Where a connection is before that: it is accepted into this queue.
    pub intake: Intake,
    /// A directory for their journals alone, on tmpfs.
    pub journals: PathBuf,
}

/// The connections of a server that outlive it.
#[derive(Debug)]
pub(super) struct StoredConnections {
    store: Arc<dyn FdStore>,
    pub(super) intake: Intake,
    pub(super) journals: Journals,
    pub(super) numbers: Numbers,
    pub(super) recreated: Arc<RecreatedJournals>,
}

impl StoredConnections {
    /// With journals in this directory, which is created if it is missing.
    pub(super) fn open(storage: ConnectionStorage) -> io::Result<Self> {
        Ok(Self {
            store: storage.store,
            intake: storage.intake,
            journals: Journals::open(storage.journals)?,
            numbers: Numbers::default(),
            recreated: Arc::default(),
        })
    }

    /// Puts a connection's socket into the store.
    pub(super) fn store(&self, number: u64, connection: &OwnedFd) -> io::Result<()> {
        self.store
            .add(&FdName::Connection(number), &[connection.as_fd()])
    }

    /// Waits until what was stored outlives this process.
    pub(super) async fn settle(&self) {
        fdstore::settle(self.store.as_ref()).await;
    }

    /// Removes a connection's socket from the store.
    pub(super) fn remove(&self, number: u64) {
        remove(self.store.as_ref(), number);
    }

    /// Where the connection's long answers are while they are sent.
    pub(super) fn answers(&self, connection: u64) -> AnswerStore {
        AnswerStore {
            store: Arc::clone(&self.store),
            connection,
        }
    }

    /// What is known of a connection as long as it is served.
    pub(super) fn serve(&self, number: u64, journal_losses: u32) -> ServedConnection {
        ServedConnection {
            number,
            store: Arc::clone(&self.store),
            journal_after: self.recreated.add(number, journal_losses),
            recreated: Arc::clone(&self.recreated),
        }
    }
}

/// A stored connection that is served.
#[derive(Debug)]
pub(super) struct ServedConnection {
    number: u64,
    store: Arc<dyn FdStore>,
    /// After how many losses of the journals its own was created.
    pub(super) journal_after: Arc<AtomicU32>,
    recreated: Arc<RecreatedJournals>,
}

impl ServedConnection {
    /// Removes what is left of a connection that has ended.
    pub(super) fn end(self) {
        self.recreated.remove(self.number);
        remove(self.store.as_ref(), self.number);
    }
}

fn remove(store: &dyn FdStore, connection: u64) {
    if let Err(error) = store.remove(&FdName::Connection(connection)) {
        debug!(connection, %error, "connection: cannot remove its socket from the descriptor store");
    }
}

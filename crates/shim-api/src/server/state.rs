//! What a server and its connections know of each other: [`ServerState`], which the server changes,
//! and [`RecreatedJournals`], which the connections do.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What all connections have to know of their server.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ServerState {
    /// Nothing is read any more.
    pub(super) is_stopping: bool,
    /// How often the journals have been removed by another program.
    pub(super) journal_losses: u32,
}

/// After which loss of the journals each connection has created its own again.
#[derive(Debug, Default)]
pub(super) struct RecreatedJournals(Mutex<HashMap<u64, Arc<AtomicU32>>>);

impl RecreatedJournals {
    /// Adds a connection whose journal was created after so many losses, and returns the number,
    /// which the connection changes when it creates its journal again.
    pub(super) fn add(&self, connection: u64, losses: u32) -> Arc<AtomicU32> {
        let entry = Arc::new(AtomicU32::new(losses));
        self.all().insert(connection, Arc::clone(&entry));
        entry
    }

    /// Removes a connection that has ended.
    pub(super) fn remove(&self, connection: u64) {
        self.all().remove(&connection);
    }

    /// Whether all connections have their journal after so many losses.
    pub(super) fn are_all_after(&self, losses: u32) -> bool {
        let all = self.all();
        all.values()
            .all(|after| after.load(Ordering::Acquire) >= losses)
    }

    fn all(&self) -> MutexGuard<'_, HashMap<u64, Arc<AtomicU32>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! [`ServerState`]: what all connections have to know of their server, and what it has to know of
//! their journals.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What all connections have to know.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ServerState {
    /// Nothing is read any more.
    pub(super) is_stopping: bool,
    /// How often the journals have been lost.
    pub(super) losses: u32,
}

/// Up to which loss of the journals each connection has written its own again.
#[derive(Debug, Default)]
pub(super) struct Noted(Mutex<HashMap<u64, Arc<AtomicU32>>>);

impl Noted {
    pub(super) fn enter(&self, connection: u64, losses: u32) -> Arc<AtomicU32> {
        let entry = Arc::new(AtomicU32::new(losses));
        self.all().insert(connection, Arc::clone(&entry));
        entry
    }

    pub(super) fn leave(&self, connection: u64) {
        self.all().remove(&connection);
    }

    pub(super) fn least(&self) -> Option<u32> {
        let all = self.all();
        all.values()
            .map(|noted| noted.load(Ordering::Acquire))
            .min()
    }

    fn all(&self) -> MutexGuard<'_, HashMap<u64, Arc<AtomicU32>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

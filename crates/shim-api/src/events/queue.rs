//! [`Outbox`]: the events for one containerd, first in, first out, each until it is acknowledged.
//! Owns the queue, in memory and on disk, and its bounds. Never sends.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use embedshim_core::event::Event;
use embedshim_core::id::TaskKey;
use tokio::sync::Notify;
use tracing::warn;

use super::backlog::{Backlog, time_of};
use super::log::{EventLog, StoredEvent};
use super::undeleted_exits::UndeletedExits;

/// The most events that wait: a busy node sends as many in some minutes. containerd asks for the
/// state of its tasks when it comes back, so of a longer absence the oldest events are the ones to
/// lose.
const CAPACITY: usize = 10_000;
/// The most bytes that wait: a `Created` has all mounts in it, so it can be long.
const LARGEST: usize = 16 << 20;

/// The unacknowledged events for one containerd.
#[derive(Debug)]
pub(super) struct Outbox {
    address: String,
    contents: Mutex<Contents>,
    arrived: Notify,
}

#[derive(Debug)]
struct Contents {
    waiting: VecDeque<Waiting>,
    /// How many bytes the waiting events have together.
    size: usize,
    /// The number of the next event.
    next: u64,
    log: EventLog,
    undeleted: UndeletedExits,
    /// How many events were acknowledged since this process began.
    acknowledged: u64,
    /// How many were given up since then, because too many waited.
    lost: u64,
}

/// An event that is not acknowledged.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    /// Which event of this outbox it is.
    number: u64,
    /// What the log needs to acknowledge it.
    span: u64,
    /// The encoded envelope.
    pub(super) envelope: Arc<[u8]>,
}

impl Outbox {
    /// An empty outbox for a containerd.
    pub(super) fn new(directory: &Path, address: &str) -> Self {
        Self::resume(EventLog::new(directory, address), Vec::new())
    }

    /// The outbox that a predecessor left.
    pub(super) fn resume(log: EventLog, stored: Vec<StoredEvent>) -> Self {
        let address = log.address().to_owned();
        let mut contents = Contents {
            waiting: VecDeque::new(),
            size: 0,
            next: 0,
            log,
            undeleted: UndeletedExits::default(),
            acknowledged: 0,
            lost: 0,
        };
        for (span, envelope) in stored {
            contents.push(span, envelope.into());
        }
        Self {
            address,
            contents: Mutex::new(contents),
            arrived: Notify::new(),
        }
    }

    /// The path of the socket on which its containerd listens.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// Adds an event, which is durable when this returns.
    pub(super) fn push(&self, event: &Event, envelope: Vec<u8>) {
        {
            let mut contents = self.contents();
            let span = contents.log.append(&envelope);
            let envelope: Arc<[u8]> = envelope.into();
            contents.undeleted.accept(event, &envelope);
            contents.push(span, envelope);
        }
        self.arrived.notify_one();
    }

    /// The oldest event.
    pub(super) fn first(&self) -> Option<Waiting> {
        self.contents().waiting.front().cloned()
    }

    /// Removes an event that containerd has, or will never take.
    pub(super) fn acknowledge(&self, event: &Waiting) {
        let mut contents = self.contents();
        // It may have been dropped meanwhile.
        if contents
            .waiting
            .front()
            .is_some_and(|first| first.number == event.number)
        {
            contents.pop();
            contents.acknowledged += 1;
        }
    }

    /// Creates its file again, if that was removed.
    pub(super) fn recreate(&self) {
        self.contents().log.recreate();
    }

    /// What waits in it at this moment.
    pub(super) fn backlog(&self) -> Backlog {
        let contents = self.contents();
        let oldest = contents
            .waiting
            .front()
            .map(|first| Arc::clone(&first.envelope));
        let mut backlog = Backlog {
            address: self.address.clone(),
            events: contents.waiting.len(),
            bytes: contents.size,
            oldest: None,
            acknowledged: contents.acknowledged,
            lost: contents.lost,
        };
        drop(contents);
        backlog.oldest = oldest.and_then(|envelope| time_of(&envelope));
        backlog
    }

    /// Completes when an event was added since the last time.
    pub(super) async fn arrived(&self) {
        self.arrived.notified().await;
    }

    /// Whether a task has exited and is not deleted.
    pub(super) fn has_undeleted(&self) -> bool {
        !self.contents().undeleted.is_empty()
    }

    /// The tasks that have exited up to this moment and are not deleted.
    pub(super) fn undeleted_until(&self, moment: Instant) -> VecDeque<TaskKey> {
        self.contents().undeleted.until(moment)
    }

    /// The exit of this task, if it is not deleted.
    pub(super) fn undeleted(&self, task: &TaskKey) -> Option<Arc<[u8]>> {
        self.contents().undeleted.get(task)
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Contents {
    fn push(&mut self, span: u64, envelope: Arc<[u8]>) {
        self.size = self.size.saturating_add(envelope.len());
        self.waiting.push_back(Waiting {
            number: self.next,
            span,
            envelope,
        });
        self.next = self.next.wrapping_add(1);
        while self.waiting.len() > CAPACITY || (self.size > LARGEST && self.waiting.len() > 1) {
            warn!(
                address = self.log.address(),
                "events: too many events wait for containerd: the oldest is lost"
            );
            self.pop();
            self.lost += 1;
        }
    }

    fn pop(&mut self) {
        if let Some(first) = self.waiting.pop_front() {
            self.size = self.size.saturating_sub(first.envelope.len());
            self.log.acknowledge(first.span);
        }
    }
}

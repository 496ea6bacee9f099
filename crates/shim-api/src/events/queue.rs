//! [`Outbox`]: the events for one containerd, first in, first out, each kept until it is acknowledged.
//! Owns the queue, in memory and on disk, and its bounds; who sends is [`Sender`](super::sender::Sender)'s business.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use embedshim_core::event::Event;
use embedshim_core::id::TaskKey;
use tokio::sync::Notify;
use tracing::warn;

use super::log::{EventLog, StoredEvent};
use super::undeleted::Unheeded;

/// As many as a busy node sends in some minutes. containerd asks for the state of its tasks when it comes back, so of a longer
/// absence the oldest events are the ones to lose.
const CAPACITY: usize = 10_000;
/// And no more bytes than this: `Created` tells of all mounts, so it can be long.
const LARGEST: usize = 16 << 20;

#[derive(Debug)]
pub(super) struct Outbox {
    address: String,
    contents: Mutex<Contents>,
    arrived: Notify,
}

#[derive(Debug)]
struct Contents {
    waiting: VecDeque<Waiting>,
    /// How long the waiting events are together.
    size: usize,
    next: u64,
    log: EventLog,
    unheeded: Unheeded,
}

/// An event that is not acknowledged.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    /// Counts the events.
    number: u64,
    /// What the log needs to acknowledge it.
    span: u64,
    /// The envelope, encoded.
    pub(super) envelope: Arc<[u8]>,
}

impl Outbox {
    /// The outbox for a containerd that nothing is known of.
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
            unheeded: Unheeded::default(),
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

    /// The socket of its containerd.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// Puts an event in, durably.
    pub(super) fn push(&self, event: &Event, envelope: Vec<u8>) {
        {
            let mut contents = self.contents();
            let span = contents.log.append(&envelope);
            let envelope: Arc<[u8]> = envelope.into();
            contents.unheeded.accept(event, &envelope);
            contents.push(span, envelope);
        }
        self.arrived.notify_one();
    }

    /// The oldest event.
    pub(super) fn first(&self) -> Option<Waiting> {
        self.contents().waiting.front().cloned()
    }

    /// containerd has this event, or will never take it.
    pub(super) fn acknowledge(&self, event: &Waiting) {
        let mut contents = self.contents();
        // It may have been dropped meanwhile.
        if contents
            .waiting
            .front()
            .is_some_and(|first| first.number == event.number)
        {
            contents.pop();
        }
    }

    /// Writes down again what waits, if its file was removed.
    pub(super) fn recreate(&self) {
        self.contents().log.recreate();
    }

    /// Completes when an event was put in since the last time.
    pub(super) async fn arrived(&self) {
        self.arrived.notified().await;
    }

    /// Whether containerd knows of an exit and has not deleted its task.
    pub(super) fn has_unheeded(&self) -> bool {
        !self.contents().unheeded.is_empty()
    }

    /// Whose exits containerd was told of up to this moment, and has not deleted.
    pub(super) fn unheeded_at(&self, moment: Instant) -> VecDeque<TaskKey> {
        self.contents().unheeded.at(moment)
    }

    /// The exit of this task, if it is not deleted.
    pub(super) fn unheeded(&self, task: &TaskKey) -> Option<Arc<[u8]>> {
        self.contents().unheeded.of(task)
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
                "too many events wait for containerd: the oldest is lost"
            );
            self.pop();
        }
    }

    fn pop(&mut self) {
        if let Some(first) = self.waiting.pop_front() {
            self.size = self.size.saturating_sub(first.envelope.len());
            self.log.acknowledge(first.span);
        }
    }
}

//! [`Outboxes`]: sends each containerd what happened to its tasks, in order, and again until it has
//! it. Owns one outbox for each address, on disk; an address on which nothing listens delays no
//! other.

mod backlog;
mod format;
mod log;
mod message;
mod queue;
mod resend;
mod sender;
mod undeleted_exits;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::shim::event::Envelope;
use embedshim_core::event::{Event, EventSink};
use protobuf::{Message, MessageField};
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tracing::warn;
use ttrpc::Status;

use crate::services::timestamp;
use crate::{state_dir, status};
pub use backlog::Backlog;
use log::EventLog;
use queue::Outbox;
use sender::Sender;

/// The longest event. The longest message that ttrpc carries is 4 MiB; an event that can never be
/// sent must not block the events behind it.
const LONGEST_EVENT: usize = (4 << 20) - (64 << 10);

/// The events of a node that containerd has not acknowledged.
#[derive(Debug)]
pub struct Outboxes {
    directory: PathBuf,
    destinations: Mutex<Destinations>,
}

#[derive(Debug, Default)]
struct Destinations {
    by_address: HashMap<String, Destination>,
    /// The runtime that sends, once [`Outboxes::start`] was called.
    runtime: Option<Handle>,
}

/// One containerd: its outbox, and the task that empties it.
#[derive(Debug)]
struct Destination {
    outbox: Arc<Outbox>,
    sender: Option<AbortHandle>,
}

impl Destination {
    fn new(outbox: Outbox, runtime: Option<&Handle>) -> Self {
        let mut destination = Self {
            outbox: Arc::new(outbox),
            sender: None,
        };
        if let Some(runtime) = runtime {
            destination.start(runtime);
        }
        destination
    }

    fn start(&mut self, runtime: &Handle) {
        let sender = Sender::new(Arc::clone(&self.outbox)).run();
        self.sender = Some(runtime.spawn(sender).abort_handle());
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        if let Some(sender) = &self.sender {
            sender.abort();
        }
    }
}

impl Outboxes {
    /// Opens what predecessors left in `directory`, which is created if it is missing. Nothing is
    /// sent yet.
    pub fn open(directory: PathBuf) -> io::Result<Arc<Self>> {
        state_dir::create(&directory)?;
        let logs = EventLog::all(&directory)?.into_iter();
        let by_address = logs.map(|(log, stored)| {
            let outbox = Outbox::resume(log, stored);
            let address = outbox.address().to_owned();
            (address, Destination::new(outbox, None))
        });
        let destinations = Destinations {
            by_address: by_address.collect(),
            runtime: None,
        };
        Ok(Arc::new(Self {
            directory,
            destinations: Mutex::new(destinations),
        }))
    }

    /// Sends from now on, until this is dropped. To be called when the node is open: then the exits
    /// that the node emits again come before the first connection. Needs a tokio runtime.
    pub fn start(&self) {
        let mut destinations = self.destinations();
        let runtime = Handle::current();
        for destination in destinations.by_address.values_mut() {
            if destination.sender.is_none() {
                destination.start(&runtime);
            }
        }
        destinations.runtime = Some(runtime);
    }

    /// Creates the files of all unacknowledged events again, after the directory was removed.
    pub fn recreate(&self) -> io::Result<()> {
        state_dir::create(&self.directory)?;
        for destination in self.destinations().by_address.values() {
            destination.outbox.recreate();
        }
        Ok(())
    }

    /// What waits for each containerd at this moment, by address.
    pub fn backlogs(&self) -> Vec<Backlog> {
        let outboxes: Vec<_> = {
            let destinations = self.destinations();
            let all = destinations.by_address.values();
            all.map(|destination| Arc::clone(&destination.outbox))
                .collect()
        };
        let mut backlogs: Vec<_> = outboxes.iter().map(|outbox| outbox.backlog()).collect();
        backlogs.sort_by(|one, other| one.address.cmp(&other.address));
        backlogs
    }

    fn destinations(&self) -> MutexGuard<'_, Destinations> {
        let locked = self.destinations.lock();
        locked.unwrap_or_else(PoisonError::into_inner)
    }

    fn outbox(&self, address: &str) -> Arc<Outbox> {
        let mut destinations = self.destinations();
        if let Some(destination) = destinations.by_address.get(address) {
            return Arc::clone(&destination.outbox);
        }
        let outbox = Outbox::new(&self.directory, address);
        let destination = Destination::new(outbox, destinations.runtime.as_ref());
        let outbox = Arc::clone(&destination.outbox);
        destinations
            .by_address
            .insert(address.to_owned(), destination);
        outbox
    }
}

impl EventSink for Outboxes {
    /// Adds the event to its outbox: one small write to tmpfs, which takes microseconds and is done
    /// in place (invariant 15).
    fn accept(&self, event: Event) {
        if event.owner.is_empty() {
            return;
        }
        let address = event.owner.strip_prefix("unix://").unwrap_or(&event.owner);
        if address.len() > format::LONGEST_ADDRESS {
            warn!(id = %event.id, address, "events: cannot send an event: the address is longer than a socket's can be");
            return;
        }
        match encode(&event) {
            Ok(envelope) => self.outbox(address).push(&event, envelope),
            Err(status) => {
                warn!(id = %event.id, error = status.message, "events: cannot encode an event: it is not sent");
            }
        }
    }
}

/// The encoded event, in containerd's envelope.
fn encode(event: &Event) -> Result<Vec<u8>, Status> {
    let (topic, message) = message::of(&event.id, &event.kind)?;
    let envelope = Envelope {
        timestamp: timestamp::of(event.at),
        namespace: event.namespace.as_str().to_owned(),
        topic: topic.to_owned(),
        event: MessageField::some(message),
        ..Envelope::default()
    };
    let encoded = envelope
        .write_to_bytes()
        .map_err(|error| status::internal(format!("{topic}: {error}")))?;
    if encoded.len() > LONGEST_EVENT {
        return Err(status::internal(format!(
            "{topic}: {} bytes are more than containerd takes",
            encoded.len()
        )));
    }
    Ok(encoded)
}

/// Whether these bytes are an outbox, damaged or not.
#[cfg(fuzzing)]
pub(crate) fn understands(bytes: &[u8]) -> bool {
    format::Contents::read(bytes).is_some()
}

//! [`Outboxes`]: tells each containerd what happened to its tasks, in order, and again until it has heard.
//! Owns one outbox for each address, on disk; an address that nobody listens on any more delays no other.

mod format;
mod log;
mod message;
mod queue;
mod resend;
mod sender;
mod undeleted;

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
use log::EventLog;
use queue::Outbox;
use sender::Sender;

/// The longest message that ttrpc carries is 4 MiB; what can never be sent must not block what comes after it.
const LONGEST_EVENT: usize = (4 << 20) - (64 << 10);

/// The events of a node that containerd has not acknowledged.
#[derive(Debug)]
pub struct Outboxes {
    directory: PathBuf,
    desks: Mutex<Desks>,
}

#[derive(Debug, Default)]
struct Desks {
    /// By address.
    open: HashMap<String, Desk>,
    /// Where to send from, as soon as we do.
    runtime: Option<Handle>,
}

#[derive(Debug)]
struct Desk {
    outbox: Arc<Outbox>,
    sender: Option<AbortHandle>,
}

impl Drop for Desk {
    fn drop(&mut self) {
        if let Some(sender) = &self.sender {
            sender.abort();
        }
    }
}

impl Desk {
    fn new(outbox: Outbox, runtime: Option<&Handle>) -> Self {
        let mut desk = Self {
            outbox: Arc::new(outbox),
            sender: None,
        };
        if let Some(runtime) = runtime {
            desk.start(runtime);
        }
        desk
    }

    fn start(&mut self, runtime: &Handle) {
        let sender = Sender::new(Arc::clone(&self.outbox)).run();
        self.sender = Some(runtime.spawn(sender).abort_handle());
    }
}

impl Outboxes {
    /// Takes over what predecessors left in `directory`, which is made if it is missing. Nothing is sent yet.
    pub fn open(directory: PathBuf) -> io::Result<Arc<Self>> {
        state_dir::create(&directory)?;
        let left = EventLog::all(&directory)?
            .into_iter()
            .map(|(ledger, left)| {
                let outbox = Outbox::resume(ledger, left);
                (outbox.address().to_owned(), Desk::new(outbox, None))
            });
        let desks = Desks {
            open: left.collect(),
            runtime: None,
        };
        Ok(Arc::new(Self {
            directory,
            desks: Mutex::new(desks),
        }))
    }

    /// Sends, from now on for as long as this lives. Call it when the node is open: then the exits that it tells again come before the
    /// first connection. Needs a tokio runtime.
    pub fn start(&self) {
        let mut desks = self.desks();
        let runtime = Handle::current();
        for desk in desks.open.values_mut() {
            if desk.sender.is_none() {
                desk.start(&runtime);
            }
        }
        desks.runtime = Some(runtime);
    }

    /// Writes down again what is not acknowledged, after the directory was removed.
    pub fn recreate(&self) -> io::Result<()> {
        state_dir::create(&self.directory)?;
        for desk in self.desks().open.values() {
            desk.outbox.recreate();
        }
        Ok(())
    }

    fn desks(&self) -> MutexGuard<'_, Desks> {
        self.desks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn outbox(&self, address: &str) -> Arc<Outbox> {
        let mut desks = self.desks();
        if let Some(desk) = desks.open.get(address) {
            return Arc::clone(&desk.outbox);
        }
        let outbox = Outbox::new(&self.directory, address);
        let desk = Desk::new(outbox, desks.runtime.as_ref());
        let outbox = Arc::clone(&desk.outbox);
        desks.open.insert(address.to_owned(), desk);
        outbox
    }
}

impl EventSink for Outboxes {
    /// Notes the event: one small write to tmpfs, which takes microseconds and is not waited for elsewhere.
    fn accept(&self, event: Event) {
        if event.owner.is_empty() {
            return;
        }
        let address = event.owner.strip_prefix("unix://").unwrap_or(&event.owner);
        if address.len() > format::LONGEST_ADDRESS {
            warn!(id = %event.id, address, "event not sent: nobody can listen on so long an address");
            return;
        }
        match encode(&event) {
            Ok(envelope) => self.outbox(address).push(&event, envelope),
            Err(status) => warn!(id = %event.id, text = status.message, "event not sent"),
        }
    }
}

/// The event in containerd's envelope, encoded.
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

//! [`EventForwarder`]: tells each containerd what happened to its tasks, in order, and again until it has heard.
//! Owns one queue for each address; an address that nobody listens on any more delays no other.

mod message;
mod outbox;

use std::collections::HashMap;

use containerd_shim_protos::shim::event::Envelope;
use embedshim_core::event::Event;
use embedshim_core::task::Node;
use protobuf::MessageField;
use tracing::warn;
use ttrpc::Status;

use crate::timestamp;
use outbox::Outbox;

/// Forwards the events of a node.
#[derive(Debug)]
pub struct EventForwarder {
    node: Node,
    outboxes: HashMap<String, Outbox>,
}

impl EventForwarder {
    /// A forwarder for all events of `node`; there should be one.
    pub fn new(node: Node) -> Self {
        Self {
            node,
            outboxes: HashMap::new(),
        }
    }

    /// Forwards until the node is gone.
    pub async fn run(mut self) {
        while let Some(event) = self.node.next_event().await {
            if event.owner.is_empty() {
                continue;
            }
            match envelope(&event) {
                Ok(envelope) => self.outbox(&event.owner).send(envelope),
                Err(status) => warn!(id = %event.id, text = status.message, "event not sent"),
            }
        }
    }

    fn outbox(&mut self, address: &str) -> &Outbox {
        self.outboxes
            .entry(address.to_owned())
            .or_insert_with(|| Outbox::open(address))
    }
}

/// The event in containerd's envelope.
fn envelope(event: &Event) -> Result<Envelope, Status> {
    let (topic, message) = message::of(&event.id, &event.kind)?;
    Ok(Envelope {
        timestamp: timestamp::of(event.at),
        namespace: event.namespace.as_str().to_owned(),
        topic: topic.to_owned(),
        event: MessageField::some(message),
        ..Envelope::default()
    })
}

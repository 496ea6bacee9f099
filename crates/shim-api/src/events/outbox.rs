//! [`Outbox`]: the events for one containerd, first in, first out, each sent until it is acknowledged.
//! Owns the connection to that containerd, opened when there is something to say.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use protobuf::MessageField;
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tracing::{debug, warn};
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context;

/// As many as a busy node sends in some minutes. containerd asks for the state of its tasks when it comes back, so of a longer
/// absence the oldest events are the ones to lose.
const CAPACITY: usize = 10_000;
/// The same as Go's publisher.
const FORWARD_DEADLINE: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Outbox {
    queue: Arc<Queue>,
    sender: AbortHandle,
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.sender.abort();
    }
}

#[derive(Debug)]
struct Queue {
    address: String,
    waiting: Mutex<VecDeque<Envelope>>,
    arrived: Notify,
}

/// What became of one attempt.
enum Attempt {
    Delivered,
    /// containerd will never take this one.
    Refused(String),
    Failed(String),
}

impl Outbox {
    /// The outbox for the containerd behind this socket.
    pub(super) fn open(address: &str) -> Self {
        let queue = Arc::new(Queue {
            address: address
                .strip_prefix("unix://")
                .unwrap_or(address)
                .to_owned(),
            waiting: Mutex::default(),
            arrived: Notify::new(),
        });
        let sender = tokio::spawn(Arc::clone(&queue).drain()).abort_handle();
        Self { queue, sender }
    }

    /// Puts an event in.
    pub(super) fn send(&self, envelope: Envelope) {
        self.queue.push(envelope);
    }
}

impl Queue {
    fn push(&self, envelope: Envelope) {
        let dropped = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            let dropped = if waiting.len() >= CAPACITY {
                waiting.pop_front()
            } else {
                None
            };
            waiting.push_back(envelope);
            dropped
        };
        if let Some(dropped) = dropped {
            warn!(
                address = self.address,
                topic = dropped.topic,
                "too many events wait for containerd: the oldest is lost"
            );
        }
        self.arrived.notify_one();
    }

    async fn next(&self) -> Envelope {
        loop {
            let next = self
                .waiting
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop_front();
            match next {
                Some(envelope) => return envelope,
                None => self.arrived.notified().await,
            }
        }
    }

    async fn drain(self: Arc<Self>) {
        let mut connection = None;
        loop {
            let envelope = self.next().await;
            debug!(
                topic = envelope.topic,
                namespace = envelope.namespace,
                "event"
            );
            self.deliver(envelope, &mut connection).await;
        }
    }

    /// Sends one event until it is taken or refused for good.
    async fn deliver(&self, envelope: Envelope, connection: &mut Option<EventsClient>) {
        let request = ForwardRequest {
            envelope: MessageField::some(envelope),
            ..ForwardRequest::default()
        };
        let topic = request.envelope.topic.as_str();
        let mut pause = FIRST_PAUSE;
        loop {
            let reused = connection.is_some();
            let why = match self.attempt(&request, connection).await {
                Attempt::Delivered => return,
                Attempt::Refused(why) => {
                    return warn!(
                        address = self.address,
                        topic, why, "containerd refuses an event"
                    );
                }
                Attempt::Failed(why) => why,
            };
            *connection = None;
            if reused {
                // containerd was restarted since the last event; a new connection may do at once.
                continue;
            }
            if pause == FIRST_PAUSE {
                warn!(
                    address = self.address,
                    topic, why, "containerd does not take events; trying again until it does"
                );
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn attempt(
        &self,
        request: &ForwardRequest,
        connection: &mut Option<EventsClient>,
    ) -> Attempt {
        let client = match connection {
            Some(client) => client,
            None => match UnixStream::connect(&self.address).await {
                Ok(stream) => {
                    connection.insert(EventsClient::new(Client::new(Socket::new(stream))))
                }
                Err(error) => return Attempt::Failed(error.to_string()),
            },
        };
        let forwarded = client.forward(context::with_duration(FORWARD_DEADLINE), request);
        // ttrpc's own timeout does not cover a peer that does not read.
        match tokio::time::timeout(2 * FORWARD_DEADLINE, forwarded).await {
            Ok(Ok(_)) => Attempt::Delivered,
            Ok(Err(ttrpc::Error::RpcStatus(status)))
                if status.code() == ttrpc::Code::INVALID_ARGUMENT =>
            {
                Attempt::Refused(status.message)
            }
            Ok(Err(error)) => Attempt::Failed(error.to_string()),
            Err(_) => Attempt::Failed("no answer".into()),
        }
    }
}

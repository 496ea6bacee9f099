//! [`Sender`]: empties one outbox, in order, and tries again until containerd has every event. Owns
//! the connection to that containerd, opened when there is an event, and notices when it ends.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use protobuf::{Message, MessageField};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::{sleep, sleep_until, timeout};
use tracing::{debug, warn};
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context;

use super::queue::{Outbox, Waiting};
use super::resend::ResendSchedule;

/// As long as Go's publisher waits.
const FORWARD_DEADLINE: Duration = Duration::from_secs(5);
/// The pause after a failed attempt, which doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What sends the events of one outbox.
pub(super) struct Sender {
    outbox: Arc<Outbox>,
    connection: Option<Connection>,
    /// The pause before the next attempt; it grows while containerd does not answer.
    pause: Duration,
    /// A warning says that containerd does not take events.
    has_warned: bool,
    /// There was an attempt to connect: the next connection may be to a containerd that was
    /// restarted.
    has_tried: bool,
    schedule: ResendSchedule,
}

/// A connection to containerd.
struct Connection {
    client: EventsClient,
    /// The client's socket, to notice its end while nothing is sent.
    socket: UnixStream,
}

/// What became of one attempt.
enum Attempt {
    /// containerd has the event.
    Delivered,
    /// containerd will never take this event, and says why.
    Refused(String),
    /// containerd does not have the event, and may take it later.
    Failed(String),
}

impl Sender {
    /// The sender of this outbox.
    pub(super) fn new(outbox: Arc<Outbox>) -> Self {
        Self {
            outbox,
            connection: None,
            pause: FIRST_PAUSE,
            has_warned: false,
            has_tried: false,
            schedule: ResendSchedule::default(),
        }
    }

    /// Sends until it is dropped.
    pub(super) async fn run(mut self) {
        loop {
            if let Some(event) = self.outbox.first() {
                self.deliver(&event).await;
            } else if let Some(exit) = self.next_resend() {
                self.resend(&exit).await;
            } else {
                self.idle().await;
            }
        }
    }

    /// Tries once to send the oldest event; after a failure it is still the oldest.
    async fn deliver(&mut self, event: &Waiting) {
        let Ok(envelope) = Envelope::parse_from_bytes(&event.envelope) else {
            warn!(
                address = self.outbox.address(),
                "events: cannot decode an event: it is lost"
            );
            return self.outbox.acknowledge(event);
        };
        let topic = envelope.topic.clone();
        debug!(
            topic,
            namespace = envelope.namespace,
            "events: sending an event"
        );
        let is_reused = self.connection.is_some();
        let why = match self.attempt(envelope).await {
            Attempt::Delivered => {
                self.pause = FIRST_PAUSE;
                self.has_warned = false;
                return self.outbox.acknowledge(event);
            }
            Attempt::Refused(why) => {
                let address = self.outbox.address();
                warn!(
                    address,
                    topic,
                    error = why,
                    "events: containerd refuses an event: it is dropped"
                );
                return self.outbox.acknowledge(event);
            }
            Attempt::Failed(why) => why,
        };
        self.connection = None;
        if is_reused {
            // containerd was restarted since the last event: a new connection may work at once.
            return;
        }
        if !std::mem::replace(&mut self.has_warned, true) {
            let address = self.outbox.address();
            warn!(
                address,
                topic,
                error = why,
                "events: containerd does not accept events: trying again until it does"
            );
        }
        sleep(self.next_pause()).await;
    }

    fn next_pause(&mut self) -> Duration {
        let pause = self.pause;
        self.pause = (pause * 2).min(LONGEST_PAUSE);
        pause
    }

    fn next_resend(&mut self) -> Option<Arc<[u8]>> {
        // Without a connection there will be another one, and its schedule.
        self.connection.as_ref()?;
        self.schedule.next(&self.outbox, Instant::now())
    }

    /// Tries once to send an exit again, whose task is not deleted; containerd has acknowledged it
    /// before.
    async fn resend(&mut self, exit: &[u8]) {
        let Ok(envelope) = Envelope::parse_from_bytes(exit) else {
            return;
        };
        debug!(
            namespace = envelope.namespace,
            "events: sending an exit again: its task is not deleted"
        );
        if let Attempt::Failed(why) = self.attempt(envelope).await {
            debug!(
                error = why,
                "events: containerd does not accept an exit that is sent again"
            );
            self.connection = None;
        }
    }

    /// Waits until there is something to do.
    async fn idle(&mut self) {
        let Some(connection) = &self.connection else {
            if !self.outbox.has_undeleted() {
                return self.outbox.arrived().await;
            }
            // No event waits, but as soon as containerd listens again, exits are sent again.
            let pause = self.next_pause();
            tokio::select! {
                () = self.outbox.arrived() => return,
                () = sleep(pause) => {}
            }
            if let Err(error) = self.connect().await {
                debug!(address = self.outbox.address(), %error, "events: cannot connect to containerd");
            }
            return;
        };
        let due = async {
            match self.schedule.due() {
                Some(due) => sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        let has_ended = tokio::select! {
            () = self.outbox.arrived() => false,
            () = due => false,
            () = end_of(&connection.socket) => true,
        };
        if has_ended {
            self.connection = None;
            // A peer that closes its connections at once is not called in a loop.
            if self.schedule.is_over() {
                self.pause = FIRST_PAUSE;
            }
        }
    }

    async fn attempt(&mut self, envelope: Envelope) -> Attempt {
        let request = ForwardRequest {
            envelope: MessageField::some(envelope),
            ..ForwardRequest::default()
        };
        let client = match self.connect().await {
            Ok(client) => client,
            Err(error) => return Attempt::Failed(error.to_string()),
        };
        let forwarded = client.forward(context::with_duration(FORWARD_DEADLINE), &request);
        // ttrpc's own timeout does not cover a peer that does not read.
        match timeout(2 * FORWARD_DEADLINE, forwarded).await {
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

    async fn connect(&mut self) -> io::Result<&EventsClient> {
        let connection = if let Some(connection) = self.connection.take() {
            connection
        } else {
            // After the first attempt containerd may have been restarted. Before it, that matters
            // if there are exits already.
            let has_tried = std::mem::replace(&mut self.has_tried, true);
            let connection = Connection::open(self.outbox.address()).await?;
            if has_tried || self.outbox.has_undeleted() {
                self.schedule.begin(Instant::now());
            }
            connection
        };
        Ok(&self.connection.insert(connection).client)
    }
}

impl Connection {
    async fn open(address: &str) -> io::Result<Self> {
        let stream = timeout(FORWARD_DEADLINE, UnixStream::connect(address)).await??;
        let stream = stream.into_std()?;
        let socket = UnixStream::from_std(stream.try_clone()?)?;
        let stream = UnixStream::from_std(stream)?;
        let client = EventsClient::new(Client::new(Socket::new(stream)));
        Ok(Self { client, socket })
    }
}

/// Completes when the peer has closed the connection; what there is to read is the client's.
async fn end_of(socket: &UnixStream) {
    while let Ok(ready) = socket.ready(Interest::READABLE).await {
        if ready.is_read_closed() {
            return;
        }
        let unread: io::Result<()> =
            socket.try_io(Interest::READABLE, || Err(io::ErrorKind::WouldBlock.into()));
        debug_assert!(unread.is_err());
    }
}

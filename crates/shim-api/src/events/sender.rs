//! [`Sender`]: empties one outbox, in order, and tries again until containerd has heard.
//! Owns the connection to that containerd, opened when there is something to say, and notices when it ends.

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
use super::resend::Rounds;

/// The same as Go's publisher.
const FORWARD_DEADLINE: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

pub(super) struct Sender {
    outbox: Arc<Outbox>,
    connection: Option<Connection>,
    /// Until the next attempt; grows while containerd is away.
    pause: Duration,
    /// It was said that containerd does not take events.
    has_complained: bool,
    /// There was a connection, or an attempt: the next one may be to a containerd that was restarted.
    was_away: bool,
    rounds: Rounds,
}

struct Connection {
    client: EventsClient,
    /// The same socket, to see its end while nothing is asked.
    socket: UnixStream,
}

/// What became of one attempt.
enum Attempt {
    Delivered,
    /// containerd will never take this one.
    Refused(String),
    Failed(String),
}

impl Sender {
    pub(super) fn new(outbox: Arc<Outbox>) -> Self {
        Self {
            outbox,
            connection: None,
            pause: FIRST_PAUSE,
            has_complained: false,
            was_away: false,
            rounds: Rounds::default(),
        }
    }

    /// Sends for ever.
    pub(super) async fn run(mut self) {
        loop {
            if let Some(event) = self.outbox.first() {
                self.deliver(&event).await;
            } else if let Some(exit) = self.next_again() {
                self.tell_again(&exit).await;
            } else {
                self.idle().await;
            }
        }
    }

    /// Tries once to send an event that waits; what failed is still the first one afterwards.
    async fn deliver(&mut self, event: &Waiting) {
        let Ok(envelope) = Envelope::parse_from_bytes(&event.envelope) else {
            warn!(address = self.outbox.address(), "an event is not readable");
            return self.outbox.acknowledge(event);
        };
        let topic = envelope.topic.clone();
        debug!(topic, namespace = envelope.namespace, "event");
        let is_reused = self.connection.is_some();
        let why = match self.attempt(envelope).await {
            Attempt::Delivered => {
                self.pause = FIRST_PAUSE;
                self.has_complained = false;
                return self.outbox.acknowledge(event);
            }
            Attempt::Refused(why) => {
                let address = self.outbox.address();
                warn!(address, topic, why, "containerd refuses an event");
                return self.outbox.acknowledge(event);
            }
            Attempt::Failed(why) => why,
        };
        self.connection = None;
        if is_reused {
            // containerd was restarted since the last event; a new connection may do at once.
            return;
        }
        if !std::mem::replace(&mut self.has_complained, true) {
            let address = self.outbox.address();
            warn!(
                address,
                topic, why, "containerd does not take events; trying again until it does"
            );
        }
        sleep(self.next_pause()).await;
    }

    fn next_pause(&mut self) -> Duration {
        let pause = self.pause;
        self.pause = (pause * 2).min(LONGEST_PAUSE);
        pause
    }

    fn next_again(&mut self) -> Option<Arc<[u8]>> {
        // Without a connection there will be another one, and rounds after it.
        self.connection.as_ref()?;
        self.rounds.next(&self.outbox, Instant::now())
    }

    /// Tells of an exit that nobody acts on, once; containerd has acknowledged it before.
    async fn tell_again(&mut self, exit: &[u8]) {
        let Ok(envelope) = Envelope::parse_from_bytes(exit) else {
            return;
        };
        debug!(
            namespace = envelope.namespace,
            "an exit is told again: its task is not deleted"
        );
        if let Attempt::Failed(why) = self.attempt(envelope).await {
            debug!(why, "containerd does not take an exit again");
            self.connection = None;
        }
    }

    /// Waits until there is something to do.
    async fn idle(&mut self) {
        let Some(connection) = &self.connection else {
            if !self.outbox.has_unheeded() {
                return self.outbox.arrived().await;
            }
            // Nothing to say, but as soon as containerd is there again, it has to hear of these exits again.
            let pause = self.next_pause();
            tokio::select! {
                () = self.outbox.arrived() => return,
                () = sleep(pause) => {}
            }
            if let Err(error) = self.connect().await {
                debug!(address = self.outbox.address(), %error, "containerd is not there");
            }
            return;
        };
        let due = async {
            match self.rounds.due() {
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
            // A peer that hangs up at once is not called in a loop.
            if self.rounds.are_over() {
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
            // Only the first connection of all is to a containerd that we know nothing of, unless it comes after exits.
            let was_away = std::mem::replace(&mut self.was_away, true);
            let connection = Connection::open(self.outbox.address()).await?;
            if was_away || self.outbox.has_unheeded() {
                self.rounds.begin(Instant::now());
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

/// Completes when the peer has closed; leaves what there is to read to the client.
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

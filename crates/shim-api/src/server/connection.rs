//! One connection: reads requests, runs each in a task, writes the answers. Owns the rules on stream ids, and what is done again
//! for a daemon that died. When the peer goes, so do the tasks that nobody waits for any more.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use protobuf::Message;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::{Id, JoinError, JoinSet};
use tracing::{debug, error, warn};
use ttrpc::{Code, Request, Status};

use super::intake::{self, Frame, Intake};
use super::journal::{Journal, Recovered};
use super::{Call, Handler, Session};
use crate::frame::{self, Header, Kind, MAX_PAYLOAD};
use crate::status;

/// Calls under way on one connection. One container has a handful; a `Wait` for each of its execs is the most.
const MAX_CALLS: usize = 1024;

type Answer = Result<Vec<u8>, Status>;

/// The calls under way: what each answers, and on which stream.
#[derive(Debug, Default)]
struct Calls {
    tasks: JoinSet<Answer>,
    streams: HashMap<Id, u32>,
    session: Arc<Session>,
    is_namespace_noted: bool,
}

/// One connection, new or taken over.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    journal: Journal,
    intake: Intake,
    calls: Calls,
    last_stream: u32,
    /// What to do first: answers, or the end of one, that another daemon owed.
    owed: Recovered,
}

impl Connection {
    /// One that was just accepted.
    pub(super) fn new(stream: UnixStream, journal: Journal) -> Self {
        Self {
            stream,
            journal,
            intake: Intake::default(),
            calls: Calls::default(),
            last_stream: 0,
            owed: Recovered::default(),
        }
    }

    /// One that another daemon has left.
    pub(super) fn resume(
        stream: UnixStream,
        journal: Journal,
        owed: Recovered,
    ) -> io::Result<Self> {
        let intake = Intake::resume(&stream, &owed)?;
        let calls = Calls::default();
        if let Some(namespace) = owed.namespace.clone() {
            calls.session.namespace.get_or_init(|| namespace);
        }
        let last_stream = owed.pending.keys().next_back().copied().unwrap_or(0);
        Ok(Self {
            stream,
            journal,
            intake,
            calls,
            last_stream,
            owed,
        })
    }

    /// Serves until the peer leaves. A connection that has come to its end leaves no journal.
    pub(super) async fn run<H: Handler>(
        mut self,
        handler: Arc<H>,
        mut stop: watch::Receiver<bool>,
    ) -> io::Result<()> {
        let result = self.converse(&handler, &mut stop).await;
        if !*stop.borrow() {
            self.journal.remove();
        }
        result
    }

    async fn converse<H: Handler>(
        &mut self,
        handler: &Arc<H>,
        stop: &mut watch::Receiver<bool>,
    ) -> io::Result<()> {
        self.pay(handler).await?;
        loop {
            let is_stopping = *stop.borrow_and_update();
            tokio::select! {
                Some(ended) = self.calls.tasks.join_next_with_id() => {
                    if let Some((stream, answer)) = self.calls.take(ended) {
                        self.note_namespace();
                        self.answer(stream, answer).await?;
                    }
                }
                // Who stops reads no more: what is not read yet is his successor's.
                frame = self.intake.next(&self.stream, &mut self.journal), if !is_stopping => {
                    let Some(frame) = frame? else { return Ok(()) };
                    if let Err((stream, refusal)) = receive(frame, &mut self.last_stream, &mut self.calls, handler) {
                        warn!(stream, code = ?refusal.code(), text = refusal.message, "frame refused");
                        self.answer(stream, Err(refusal)).await?;
                    }
                }
                Ok(()) = stop.changed() => {}
            }
        }
    }

    /// Does what another daemon has begun, and answers for it.
    async fn pay<H: Handler>(&mut self, handler: &Arc<H>) -> io::Result<()> {
        let owed = std::mem::take(&mut self.owed);
        if !owed.rest.is_empty() {
            self.write(&owed.rest).await?;
            self.journal.rest_sent();
        }
        for stream in owed.unreadable {
            let text = "embedshimd was restarted and its note of this request was damaged";
            self.answer(stream, Err(ttrpc::get_status(Code::DATA_LOSS, text)))
                .await?;
        }
        for (stream, frame) in owed.pending {
            let begun = match intake::whole(&frame) {
                Some((header, payload)) => begin(header, payload, true, &mut self.calls, handler),
                None => Err(status::internal("a note of a request is no frame")),
            };
            if let Err(refusal) = begun {
                self.answer(stream, Err(refusal)).await?;
            }
        }
        Ok(())
    }

    /// Sends an answer, and notes that it is sent: sent twice does no harm, never would.
    async fn answer(&mut self, stream: u32, answer: Answer) -> io::Result<()> {
        self.write(&frame::response(stream, answer)).await?;
        self.journal.answered(stream);
        Ok(())
    }

    /// Sends all of it. What does not fit into the socket is noted until it does, or a successor could not go on within a frame.
    async fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let mut is_noted = false;
        while !bytes.is_empty() {
            match self.stream.try_write(bytes) {
                Ok(count) => {
                    bytes = bytes.get(count..).unwrap_or_default();
                    if !bytes.is_empty() {
                        self.journal.rest(bytes);
                        is_noted = true;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.stream.writable().await?;
                }
                Err(error) => return Err(error),
            }
        }
        if is_noted {
            self.journal.rest_sent();
        }
        Ok(())
    }

    fn note_namespace(&mut self) {
        if !self.calls.is_namespace_noted
            && let Some(namespace) = self.calls.session.namespace.get()
        {
            self.journal.namespace(namespace);
            self.calls.is_namespace_noted = true;
        }
    }
}

/// Acts on one frame; an error is what to answer on which stream.
fn receive<H: Handler>(
    frame: Frame,
    last_stream: &mut u32,
    calls: &mut Calls,
    handler: &Arc<H>,
) -> Result<(), (u32, Status)> {
    let (header, payload) = match frame {
        Frame::Whole(header, payload) => (header, payload),
        Frame::Oversized(header) => {
            let text = format!(
                "message length {} exceed maximum message size of {MAX_PAYLOAD}",
                header.length
            );
            return Err((
                header.stream,
                ttrpc::get_status(Code::RESOURCE_EXHAUSTED, text),
            ));
        }
    };
    let refuse = |text: &str| Err((header.stream, status::invalid(text)));
    match header.kind {
        Kind::Request => {}
        Kind::Data => return refuse("StreamID is no longer active"),
        Kind::Response | Kind::Unknown(_) => {
            debug!(?header, "frame ignored");
            return Ok(());
        }
    }
    if header.stream % 2 != 1 {
        return refuse("StreamID must be odd for client initiated streams");
    }
    if header.stream <= *last_stream {
        return refuse("StreamID cannot be re-used and must increment");
    }
    *last_stream = header.stream;
    begin(header, &payload, false, calls, handler).map_err(|refusal| (header.stream, refusal))
}

/// Starts the call that a request frame asks for.
fn begin<H: Handler>(
    header: Header,
    payload: &[u8],
    is_again: bool,
    calls: &mut Calls,
    handler: &Arc<H>,
) -> Result<(), Status> {
    let request = Request::parse_from_bytes(payload)
        .map_err(|error| status::invalid(format!("unmarshal request error: {error}")))?;
    if calls.tasks.len() >= MAX_CALLS {
        let text = format!("{MAX_CALLS} calls are under way on this connection");
        return Err(ttrpc::get_status(Code::RESOURCE_EXHAUSTED, text));
    }
    // What was begun is brought to its end, though its deadline has passed meanwhile.
    let limit = u64::try_from(request.timeout_nano)
        .ok()
        .filter(|&nanos| nanos > 0 && !is_again)
        .map(Duration::from_nanos);
    let handler = Arc::clone(handler);
    let call = call_of(request, is_again, Arc::clone(&calls.session));
    let task = calls.tasks.spawn(async move {
        match limit {
            None => handler.call(call).await,
            Some(limit) => tokio::time::timeout(limit, handler.call(call))
                .await
                .unwrap_or_else(|_| {
                    Err(ttrpc::get_status(
                        Code::DEADLINE_EXCEEDED,
                        "context deadline exceeded",
                    ))
                }),
        }
    });
    calls.streams.insert(task.id(), header.stream);
    Ok(())
}

fn call_of(request: Request, is_again: bool, session: Arc<Session>) -> Call {
    let mut metadata = HashMap::new();
    for pair in request.metadata {
        metadata.entry(pair.key).or_insert(pair.value);
    }
    Call {
        service: request.service,
        method: request.method,
        payload: request.payload,
        metadata,
        is_again,
        session,
    }
}

impl Calls {
    /// The answer of a call that ended, and where it belongs.
    fn take(&mut self, ended: Result<(Id, Answer), JoinError>) -> Option<(u32, Answer)> {
        let (id, answer) = ended.unwrap_or_else(|failure| {
            error!(%failure, "a call panicked");
            (
                failure.id(),
                Err(status::internal(
                    "internal error: the call panicked; see embedshimd's log",
                )),
            )
        });
        // Maps and vectors keep the capacity of their busiest moment; a connection is idle for most of its life.
        let stream = self.streams.remove(&id);
        if self.streams.is_empty() {
            self.streams = HashMap::new();
        }
        stream.map(|stream| (stream, answer))
    }
}

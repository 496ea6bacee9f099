//! [`Connection`]: one connection: reads requests, runs each in a task, writes the answers. Owns
//! the rules on stream ids, the order of noting and sending, and what is replayed for a daemon that
//! died. When the client closes it, the calls that it waited for end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use embedshim_core::failpoint;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tracing::{debug, warn};
use ttrpc::{Code, Status};

use super::answer::{self, AnswerStore, StoredAnswer};
use super::calls::{Answer, Begin, Calls};
use super::frame_reader::{self, Frame, FrameReader};
use super::handler::{Handler, Session};
use super::journal::{Identity, Journal, Recovered, UnknownRequests};
use super::state::ServerState;
use crate::frame::{self, Header, Kind, MAX_PAYLOAD};
use crate::status;

/// What another daemon has left of a connection, beside its socket.
#[derive(Debug)]
pub(super) struct Inherited {
    pub(super) answers: AnswerStore,
    /// The answer that it was sending.
    pub(super) answer: Option<StoredAnswer>,
    pub(super) journal: Journal,
    pub(super) recovered: Recovered,
}

/// One connection, new or resumed.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    journal: Journal,
    reader: FrameReader,
    calls: Calls,
    last_stream: u32,
    /// What another daemon has not answered, or not as a whole: it comes before anything new.
    pending: Option<Box<Recovered>>,
    /// Requests before the next one are lost, and are answered when its stream shows theirs.
    unknown: Option<UnknownRequests>,
    /// Stores long answers while they are sent, if the connection outlives this process.
    answers: Option<AnswerStore>,
    /// An answer that is stored, since it is not sent as a whole.
    answer: Option<StoredAnswer>,
}

impl Connection {
    /// A connection that was just accepted.
    pub(super) fn new(
        stream: UnixStream,
        answers: Option<AnswerStore>,
        journal: Journal,
        session: Session,
    ) -> Self {
        let number = answers.as_ref().map(|answers| answers.connection);
        let calls = Calls::new(number, session);
        Self {
            stream,
            journal,
            reader: FrameReader::default(),
            calls,
            last_stream: 0,
            pending: None,
            unknown: None,
            answers,
            answer: None,
        }
    }

    /// A connection that another daemon has left.
    pub(super) fn resume(stream: UnixStream, inherited: Inherited) -> io::Result<Self> {
        let Inherited {
            answers,
            answer,
            mut journal,
            recovered: mut pending,
        } = inherited;
        let reader = FrameReader::resume(&stream, &pending)?;
        // Which requests are lost, as far as it is known by now.
        let mut unknown = pending.unknown.take();
        if let Some(next) = reader.next_request(&stream)? {
            pending.unreadable.extend(
                unknown
                    .take()
                    .into_iter()
                    .flat_map(|lost| lost.before(next)),
            );
            // It and what follows is still in the socket, whatever is noted of it.
            pending.unreadable.retain(|&stream| stream < next);
        } else if let Some(lost) = unknown.and_then(UnknownRequests::after_last) {
            pending.unreadable.extend(lost);
            unknown = None;
        }
        for &stream in &pending.unreadable {
            journal.lost(stream);
        }
        // What is known of the connection.
        let session = Session {
            is_namespace_lost: pending.is_namespace_lost,
            ..Session::default()
        };
        let calls = Calls::new(Some(answers.connection), session);
        if let Some(namespace) = pending.identity.namespace.clone() {
            calls.session.namespace.get_or_init(|| namespace);
        }
        calls
            .session
            .creation()
            .clone_from(&pending.identity.creation);
        let last_stream = pending.pending.keys().next_back().copied().unwrap_or(0);
        Ok(Self {
            stream,
            journal,
            reader,
            calls,
            last_stream,
            pending: Some(Box::new(pending)),
            unknown,
            answers: Some(answers),
            answer,
        })
    }

    /// Serves until the client closes the connection, which then leaves no journal. `journal_after`
    /// is the loss of the journals after which this one was created again.
    pub(super) async fn run<H: Handler>(
        &mut self,
        handler: &Arc<H>,
        state: &mut watch::Receiver<ServerState>,
        journal_after: Option<&AtomicU32>,
    ) -> io::Result<()> {
        let result = self.converse(handler, state, journal_after).await;
        if !state.borrow().is_stopping {
            self.remove_answer();
            self.journal.remove();
        }
        result
    }

    async fn converse<H: Handler>(
        &mut self,
        handler: &Arc<H>,
        state: &mut watch::Receiver<ServerState>,
        journal_after: Option<&AtomicU32>,
    ) -> io::Result<()> {
        let mut losses = state.borrow().journal_losses;
        if let Some(pending) = self.pending.take() {
            Box::pin(self.replay(*pending, handler)).await?;
        }
        loop {
            let now = *state.borrow_and_update();
            if now.journal_losses > losses {
                losses = now.journal_losses;
                self.journal.recreate();
                if let Some(after) = journal_after {
                    after.store(losses, Ordering::Release);
                }
            }
            tokio::select! {
                Some(ended) = self.calls.tasks.join_next_with_id() => {
                    if let Some((stream, answer)) = self.calls.take(ended) {
                        self.note_identity();
                        self.answer(stream, answer).await?;
                    }
                }
                outcomes = self.calls.outcomes.next() => {
                    for outcome in outcomes {
                        self.journal.outcome(outcome.stream, &outcome.answer);
                        // The call that waited for it may have been dropped.
                        let _ = outcome.noted.send(());
                    }
                }
                // A daemon that stops leaves what it has not read to its successor.
                frame = self.reader.next(&self.stream, &mut self.journal), if !now.is_stopping => {
                    let Some(frame) = frame? else { return Ok(()) };
                    self.refuse_unknown(&frame).await?;
                    if let Err((stream, refusal)) = self.receive(frame, handler) {
                        let connection = self.number();
                        warn!(connection, stream, code = ?refusal.code(), error = refusal.message, "connection: refusing a frame");
                        self.answer(stream, Err(refusal)).await?;
                    }
                }
                Ok(()) = state.changed() => {}
            }
        }
    }

    /// Answers what another daemon has read and not answered.
    async fn replay<H: Handler>(
        &mut self,
        mut pending: Recovered,
        handler: &Arc<H>,
    ) -> io::Result<()> {
        // The answer, or the end of one, that was being sent.
        if let Some(answer) = &mut self.answer {
            // Its request is answered by this, whatever else is noted of it.
            let stream = answer.stream()?;
            answer.send(&self.stream).await?;
            // A refusal is noted as a whole, too.
            let rest = pending.rest.first_chunk().copied().map(Header::decode);
            if rest.is_some_and(|rest| rest.stream == stream) {
                pending.rest.clear();
            }
            pending.pending.remove(&stream);
            pending.unreadable.remove(&stream);
            self.journal.rest_sent();
            self.journal.answered(stream);
            self.remove_answer();
        }
        if !pending.rest.is_empty() {
            self.write(&pending.rest).await?;
            self.journal.rest_sent();
        }
        // The requests that are lost.
        for stream in pending.unreadable {
            self.answer(stream, Err(status::damaged("this request")))
                .await?;
        }
        // The requests that are not answered.
        let mut outcomes = pending.outcomes;
        for (stream, frame) in pending.pending {
            let damaged = || status::damaged("this request's answer");
            let outcome = outcomes.remove(&stream);
            let outcome = outcome.map(|outcome| outcome.ok_or_else(damaged));
            let begun = match frame_reader::whole(&frame) {
                Some((header, payload)) => {
                    let replay = Begin {
                        header,
                        payload,
                        is_replay: true,
                        outcome,
                    };
                    self.calls.begin(replay, handler)
                }
                None => Err(status::internal("a note of a request is no frame")),
            };
            if let Err(refusal) = begun {
                self.answer(stream, Err(refusal)).await?;
            }
        }
        Ok(())
    }

    /// Answers the lost requests that came before this one.
    async fn refuse_unknown(&mut self, next: &Frame) -> io::Result<()> {
        let next = next.header().stream;
        for stream in self
            .unknown
            .take()
            .into_iter()
            .flat_map(|lost| lost.before(next))
        {
            self.answer(stream, Err(status::damaged("this request")))
                .await?;
        }
        Ok(())
    }

    /// Starts the call that a frame asks for; an error is what to answer on which stream, in the
    /// words of Go's server.
    fn receive<H: Handler>(&mut self, frame: Frame, handler: &Arc<H>) -> Result<(), (u32, Status)> {
        let (header, payload) = match frame {
            Frame::Whole(header, payload) => (header, payload),
            Frame::Oversized(header) => {
                let text = format!(
                    "message length {} exceed maximum message size of {MAX_PAYLOAD}",
                    header.length
                );
                let refusal = ttrpc::get_status(Code::RESOURCE_EXHAUSTED, text);
                return Err((header.stream, refusal));
            }
            Frame::Damaged(header) => {
                self.last_stream = header.stream.max(self.last_stream);
                return Err((header.stream, status::damaged("this request")));
            }
        };
        let refuse = |text: &str| Err((header.stream, status::invalid(text)));
        match header.kind {
            Kind::Request => {}
            Kind::Data => return refuse("StreamID is no longer active"),
            Kind::Response | Kind::Unknown(_) => {
                debug!(
                    connection = self.number(),
                    ?header,
                    "connection: ignoring a frame"
                );
                return Ok(());
            }
        }
        if header.stream % 2 != 1 {
            return refuse("StreamID must be odd for client initiated streams");
        }
        if header.stream <= self.last_stream {
            return refuse("StreamID cannot be re-used and must increment");
        }
        self.last_stream = header.stream;
        let new = Begin {
            header,
            payload: &payload,
            is_replay: false,
            outcome: None,
        };
        self.calls
            .begin(new, handler)
            .map_err(|refusal| (header.stream, refusal))
    }

    /// Sends an answer, and notes that it is sent: sending an answer twice is harmless (Go ignores
    /// the second), never sending it hangs the client. A refusal is noted before it is sent, or a
    /// successor would carry the request out, of which the client believes that it was not, and
    /// for example mount the root of a container that was not created.
    async fn answer(&mut self, stream: u32, answer: Answer) -> io::Result<()> {
        failpoint::step("before an answer is sent");
        let is_refusal = answer.is_err();
        let frame = frame::response(stream, answer);
        if is_refusal {
            self.journal.refused(stream, &frame);
        }
        self.send(&frame).await?;
        failpoint::step("after an answer was sent");
        self.journal.rest_sent();
        self.journal.answered(stream);
        self.remove_answer();
        Ok(())
    }

    /// Sends an answer, so that a successor knows at any instant how much of it is sent.
    async fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        let is_whole = answer::is_sent_whole(&self.stream, frame.len());
        let Some(answers) = self.answers.as_ref().filter(|_| !is_whole) else {
            return self.write(frame).await;
        };
        match answers.store(frame) {
            Ok(answer) => self.answer.insert(answer).send(&self.stream).await,
            Err(error) => {
                let connection = answers.connection;
                warn!(connection, %error, "connection: cannot store a long answer: the connection is lost if this daemon is killed while it is sent");
                self.write(frame).await
            }
        }
    }

    /// The connection's number, if it outlives this process.
    fn number(&self) -> Option<u64> {
        self.answers.as_ref().map(|answers| answers.connection)
    }

    /// Removes the answer that is sent from the descriptor store.
    fn remove_answer(&mut self) {
        let answers = self.answers.as_ref();
        if let Some(answers) = answers.filter(|_| self.answer.take().is_some())
            && let Err(error) = answers.remove()
        {
            debug!(connection = answers.connection, %error, "connection: cannot remove a sent answer from the descriptor store");
        }
    }

    /// Sends all of it. What does not fit into the socket is noted until it does, or a successor
    /// could not go on within a frame.
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

    /// Notes the connection's namespace and bundle, once they are known.
    fn note_identity(&mut self) {
        let session = &self.calls.session;
        let (namespace, creation) = (session.namespace.get(), session.creation());
        let now = (
            namespace.is_some(),
            creation.as_ref().map(|creation| creation.bundle),
        );
        if now != self.calls.noted {
            self.journal.identity(&Identity {
                namespace: namespace.cloned(),
                creation: creation.clone(),
            });
            self.calls.noted = now;
        }
    }
}

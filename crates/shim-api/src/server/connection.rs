//! One connection: reads requests, runs each in a task, writes the answers. Owns the rules on
//! stream ids, and what is done again for a daemon that died. When the peer goes, so do the tasks
//! that nobody waits for any more.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use embedshim_core::failpoint;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tracing::{debug, warn};
use ttrpc::{Code, Status};

use super::answer::{self, AnswerStore, StoredAnswer};
use super::calls::{Answer, Begin, Calls, begin};
use super::frame_reader::{self, Frame, Intake};
use super::handler::{Handler, Outcome, Session};
use super::journal::{Identity, Journal, Recovered, UnknownRequests};
use super::state::ServerState;
use crate::frame::{self, Header, Kind, MAX_PAYLOAD};
use crate::status;

/// What another daemon has left of a connection, beside its socket.
#[derive(Debug)]
pub(super) struct Left {
    pub(super) answers: AnswerStore,
    /// The answer that it was about to send.
    pub(super) answer: Option<StoredAnswer>,
    pub(super) journal: Journal,
    pub(super) owed: Recovered,
}

/// One connection, new or taken over.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    journal: Journal,
    intake: Intake,
    calls: Calls,
    outcomes: mpsc::Receiver<Outcome>,
    last_stream: u32,
    /// What to do first: answers, or the end of one, that another daemon owed.
    owed: Recovered,
    /// Requests before the next one are lost, and are answered when that tells which.
    unknown: Option<UnknownRequests>,
    /// Holds long answers while they are sent, if the connection is kept.
    answers: Option<AnswerStore>,
    /// One that a predecessor, or this daemon, has not sent as a whole.
    answer: Option<StoredAnswer>,
}

impl Connection {
    /// One that was just accepted.
    pub(super) fn new(
        stream: UnixStream,
        answers: Option<AnswerStore>,
        journal: Journal,
        session: Session,
    ) -> Self {
        let number = answers.as_ref().map(|answers| answers.connection);
        let (calls, outcomes) = Calls::new(number, session);
        Self {
            stream,
            journal,
            intake: Intake::default(),
            calls,
            outcomes,
            last_stream: 0,
            owed: Recovered::default(),
            unknown: None,
            answers,
            answer: None,
        }
    }

    /// One that another daemon has left.
    pub(super) fn resume(stream: UnixStream, left: Left) -> io::Result<Self> {
        let Left {
            answers,
            answer,
            mut journal,
            mut owed,
        } = left;
        let intake = Intake::resume(&stream, &owed)?;
        let mut unknown = owed.unknown.take();
        if let Some(next) = intake.next_request(&stream)? {
            owed.unreadable.extend(
                unknown
                    .take()
                    .into_iter()
                    .flat_map(|lost| lost.before(next)),
            );
            // It and what follows was not begun, whatever is noted of it.
            owed.unreadable.retain(|&stream| stream < next);
        } else if let Some(lost) = unknown.and_then(UnknownRequests::after_last) {
            owed.unreadable.extend(lost);
            unknown = None;
        }
        for &stream in &owed.unreadable {
            journal.lost(stream);
        }
        let session = Session {
            is_namespace_lost: owed.is_namespace_lost,
            ..Session::default()
        };
        let (calls, outcomes) = Calls::new(Some(answers.connection), session);
        if let Some(namespace) = owed.identity.namespace.clone() {
            calls.session.namespace.get_or_init(|| namespace);
        }
        calls.session.creation().clone_from(&owed.identity.creation);
        let last_stream = owed.pending.keys().next_back().copied().unwrap_or(0);
        Ok(Self {
            stream,
            journal,
            intake,
            calls,
            outcomes,
            last_stream,
            owed,
            unknown,
            answers: Some(answers),
            answer,
        })
    }

    /// Serves until the peer leaves. A connection that has come to its end leaves no journal.
    /// `noted` is the last loss of the journals after which its own is written again.
    pub(super) async fn run<H: Handler>(
        mut self,
        handler: Arc<H>,
        mut course: watch::Receiver<ServerState>,
        noted: Option<&AtomicU32>,
    ) -> io::Result<()> {
        let result = self.converse(&handler, &mut course, noted).await;
        if !course.borrow().is_stopping {
            self.forget_answer();
            self.journal.remove();
        }
        result
    }

    async fn converse<H: Handler>(
        &mut self,
        handler: &Arc<H>,
        course: &mut watch::Receiver<ServerState>,
        noted: Option<&AtomicU32>,
    ) -> io::Result<()> {
        let mut losses = course.borrow().losses;
        self.pay(handler).await?;
        loop {
            let now = *course.borrow_and_update();
            if now.losses > losses {
                losses = now.losses;
                self.journal.recreate();
                if let Some(noted) = noted {
                    noted.store(losses, Ordering::Release);
                }
            }
            tokio::select! {
                Some(ended) = self.calls.tasks.join_next_with_id() => {
                    if let Some((stream, answer)) = self.calls.take(ended) {
                        self.note_identity();
                        self.answer(stream, answer).await?;
                    }
                }
                Some(outcome) = self.outcomes.recv() => {
                    self.journal.outcome(outcome.stream, &outcome.answer);
                    // Whoever waited for it may have been dropped.
                    let _ = outcome.noted.send(());
                }
                // Who stops reads no more: what is not read yet is his successor's.
                frame = self.intake.next(&self.stream, &mut self.journal), if !now.is_stopping => {
                    let Some(frame) = frame? else { return Ok(()) };
                    self.refuse_unknown(&frame).await?;
                    if let Err((stream, refusal)) = receive(frame, &mut self.last_stream, &mut self.calls, handler) {
                        warn!(stream, code = ?refusal.code(), text = refusal.message, "frame refused");
                        self.answer(stream, Err(refusal)).await?;
                    }
                }
                Ok(()) = course.changed() => {}
            }
        }
    }

    /// Does what another daemon has begun, and answers for it.
    async fn pay<H: Handler>(&mut self, handler: &Arc<H>) -> io::Result<()> {
        let mut owed = std::mem::take(&mut self.owed);
        if let Some(answer) = &mut self.answer {
            // Its request is answered by this, whatever else is noted of it.
            let stream = answer.stream()?;
            answer.send(&self.stream).await?;
            // The same, if it is a refusal.
            let rest = owed.rest.first_chunk().copied().map(Header::decode);
            if rest.is_some_and(|rest| rest.stream == stream) {
                owed.rest.clear();
            }
            owed.pending.remove(&stream);
            owed.unreadable.remove(&stream);
            self.journal.rest_sent();
            self.journal.answered(stream);
            self.forget_answer();
        }
        if !owed.rest.is_empty() {
            self.write(&owed.rest).await?;
            self.journal.rest_sent();
        }
        for stream in owed.unreadable {
            self.answer(stream, Err(status::damaged("this request")))
                .await?;
        }
        let mut outcomes = owed.outcomes;
        for (stream, frame) in owed.pending {
            let damaged = || status::damaged("this request's answer");
            let outcome = outcomes.remove(&stream);
            let outcome = outcome.map(|outcome| outcome.ok_or_else(damaged));
            let begun = match frame_reader::whole(&frame) {
                Some((header, payload)) => {
                    let again = Begin {
                        header,
                        payload,
                        is_again: true,
                        outcome,
                    };
                    begin(again, &mut self.calls, handler)
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

    /// Sends an answer, and notes that it is sent: sent twice does no harm, never would. A refusal
    /// is noted before it is sent, or our successor would do anew what the client goes on from as
    /// not done, such as mount the root of a container that was not created.
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
        self.forget_answer();
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
                warn!(connection, %error, "a long answer is not stored: a kill while it is sent would break the connection");
                self.write(frame).await
            }
        }
    }

    fn forget_answer(&mut self) {
        let answers = self.answers.as_ref();
        if let Some(answers) = answers.filter(|_| self.answer.take().is_some())
            && let Err(error) = answers.forget()
        {
            debug!(%error, connection = answers.connection, "an answer that is sent is still stored");
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
        Frame::Damaged(header) => {
            *last_stream = header.stream.max(*last_stream);
            return Err((header.stream, status::damaged("this request")));
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
    let new = Begin {
        header,
        payload: &payload,
        is_again: false,
        outcome: None,
    };
    begin(new, calls, handler).map_err(|refusal| (header.stream, refusal))
}

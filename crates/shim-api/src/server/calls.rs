//! [`Calls`]: the calls under way on one connection, each in a task. Owns their number, their
//! deadlines and the way of an answer into the journal before it is given.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use embedshim_core::task::{BundleId, RequestId};
use protobuf::Message;
use tokio::sync::mpsc;
use tokio::task::{Id, JoinError, JoinSet};
use tracing::error;
use ttrpc::{Code, Request, Status};

use super::handler::{Call, Handler, Outcome, Outcomes, Session};
use crate::frame::Header;
use crate::status;

/// Calls under way on one connection. One container has a handful; a `Wait` for each of its execs
/// is the most.
const MAX_CALLS: usize = 1024;

pub(super) type Answer = Result<Vec<u8>, Status>;

/// The calls under way: what each answers, and on which stream.
#[derive(Debug)]
pub(super) struct Calls {
    /// Of the connection, if it is kept.
    number: Option<u64>,
    pub(super) tasks: JoinSet<Answer>,
    streams: HashMap<Id, u32>,
    pub(super) session: Arc<Session>,
    /// Whether the connection's namespace is noted, and which bundle.
    pub(super) noted: (bool, Option<BundleId>),
    outcomes: mpsc::Sender<Outcome>,
}

/// A request frame, and what is known of it beside.
pub(super) struct Begin<'a> {
    pub(super) header: Header,
    pub(super) payload: &'a [u8],
    pub(super) is_again: bool,
    /// What another daemon was about to answer, or that its note of that is damaged.
    pub(super) outcome: Option<Answer>,
}

/// Starts the call that a request frame asks for.
pub(super) fn begin<H: Handler>(
    frame: Begin<'_>,
    calls: &mut Calls,
    handler: &Arc<H>,
) -> Result<(), Status> {
    let Begin {
        header,
        payload,
        is_again,
        outcome,
    } = frame;
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
    let call = calls.call(request, header.stream, is_again);
    let task = calls.tasks.spawn(async move {
        match limit {
            None => match (handler.call(call).await, outcome) {
                // What was to be deleted is gone: it was this request that did it, in an earlier
                // life.
                (Err(refusal), Some(outcome)) if refusal.code() == Code::NOT_FOUND => outcome,
                (answer, _) => answer,
            },
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

impl Calls {
    pub(super) fn new(number: Option<u64>, session: Session) -> (Self, mpsc::Receiver<Outcome>) {
        let (outcomes, receiver) = mpsc::channel(1);
        let calls = Self {
            number,
            tasks: JoinSet::new(),
            streams: HashMap::new(),
            session: Arc::new(session),
            noted: (false, None),
            outcomes,
        };
        (calls, receiver)
    }

    fn call(&self, request: Request, stream: u32, is_again: bool) -> Call {
        let mut metadata = HashMap::new();
        for pair in request.metadata {
            metadata.entry(pair.key).or_insert(pair.value);
        }
        let request_id = self
            .number
            .map(|connection| RequestId { connection, stream });
        Call {
            service: request.service,
            method: request.method,
            payload: request.payload,
            metadata,
            request: request_id,
            is_again,
            outcomes: self.number.map(|_| Outcomes {
                stream,
                sender: self.outcomes.clone(),
            }),
            session: Arc::clone(&self.session),
        }
    }

    /// The answer of a call that ended, and where it belongs.
    pub(super) fn take(&mut self, ended: Result<(Id, Answer), JoinError>) -> Option<(u32, Answer)> {
        let (id, answer) = ended.unwrap_or_else(|failure| {
            error!(%failure, "a call panicked");
            (
                failure.id(),
                Err(status::internal(
                    "internal error: the call panicked; see embedshimd's log",
                )),
            )
        });
        // Maps and vectors keep the capacity of their busiest moment; a connection is idle for most
        // of its life.
        let stream = self.streams.remove(&id);
        if self.streams.is_empty() {
            self.streams = HashMap::new();
        }
        stream.map(|stream| (stream, answer))
    }
}

//! [`Calls`]: the calls that one connection's client waits for, each in a task. Owns their number
//! and their deadlines.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use embedshim_core::task::{BundleId, RequestId};
use protobuf::Message;
use tokio::task::{Id, JoinError, JoinSet};
use tracing::error;
use ttrpc::{Code, Request, Status};

use super::handler::{Call, Handler, Session};
use super::outcomes::ToNote;
use crate::frame::Header;
use crate::status;

/// The most calls of one connection at a time. One container has a handful; a `Wait` for each of
/// its execs is the most.
const MAX_CALLS: usize = 1024;

/// The answer to a call.
pub(super) type Answer = Result<Vec<u8>, Status>;

/// The calls that are not answered: which task answers which stream.
#[derive(Debug)]
pub(super) struct Calls {
    /// The connection's number, if it outlives this process.
    connection: Option<u64>,
    pub(super) tasks: JoinSet<Answer>,
    streams: HashMap<Id, u32>,
    pub(super) session: Arc<Session>,
    /// Whether the connection's namespace is in its journal, and which bundle is.
    pub(super) noted: (bool, Option<BundleId>),
    /// The answers that are to be noted before they are given.
    pub(super) outcomes: ToNote,
}

/// A request frame, and what is known of it beside.
pub(super) struct Begin<'a> {
    pub(super) header: Header,
    pub(super) payload: &'a [u8],
    /// Another daemon read this request and died before it was answered.
    pub(super) is_replay: bool,
    /// What that daemon was about to answer, or that its note of it is damaged.
    pub(super) outcome: Option<Answer>,
}

impl Calls {
    /// No calls yet.
    pub(super) fn new(connection: Option<u64>, session: Session) -> Self {
        Self {
            connection,
            tasks: JoinSet::new(),
            streams: HashMap::new(),
            session: Arc::new(session),
            noted: (false, None),
            outcomes: ToNote::default(),
        }
    }

    /// Starts the call that a request frame asks for.
    pub(super) fn begin<H: Handler>(
        &mut self,
        frame: Begin<'_>,
        handler: &Arc<H>,
    ) -> Result<(), Status> {
        let Begin {
            header,
            payload,
            is_replay,
            outcome,
        } = frame;
        let request = Request::parse_from_bytes(payload)
            .map_err(|error| status::invalid(format!("unmarshal request error: {error}")))?;
        if self.tasks.len() >= MAX_CALLS {
            let text = format!("{MAX_CALLS} calls are under way on this connection");
            return Err(ttrpc::get_status(Code::RESOURCE_EXHAUSTED, text));
        }
        // A replay is brought to its end, though its deadline has passed meanwhile.
        let limit = u64::try_from(request.timeout_nano)
            .ok()
            .filter(|&nanos| nanos > 0 && !is_replay)
            .map(Duration::from_nanos);
        let handler = Arc::clone(handler);
        let call = self.call(request, header.stream, is_replay);
        let task = self.tasks.spawn(async move {
            match limit {
                None => match (handler.call(call).await, outcome) {
                    // What was to be deleted is gone: this request has deleted it, for the daemon
                    // that noted the outcome.
                    (Err(refusal), Some(outcome)) if refusal.code() == Code::NOT_FOUND => outcome,
                    (answer, _) => answer,
                },
                Some(limit) => tokio::time::timeout(limit, handler.call(call))
                    .await
                    .unwrap_or_else(|_| Err(deadline_exceeded())),
            }
        });
        self.streams.insert(task.id(), header.stream);
        Ok(())
    }

    fn call(&self, request: Request, stream: u32, is_replay: bool) -> Call {
        let mut metadata = HashMap::new();
        for pair in request.metadata {
            metadata.entry(pair.key).or_insert(pair.value);
        }
        let request_id = self
            .connection
            .map(|connection| RequestId { connection, stream });
        Call {
            service: request.service,
            method: request.method,
            payload: request.payload,
            metadata,
            request: request_id,
            is_replay,
            outcomes: self.connection.map(|_| self.outcomes.from(stream)),
            session: Arc::clone(&self.session),
        }
    }

    /// The answer of a task that ended, and its stream.
    pub(super) fn take(&mut self, ended: Result<(Id, Answer), JoinError>) -> Option<(u32, Answer)> {
        let (id, answer) = ended.unwrap_or_else(|failure| {
            error!(connection = self.connection, error = %failure, "connection: a call panicked");
            (
                failure.id(),
                Err(status::internal(
                    "internal error: the call panicked; see embedshimd's log",
                )),
            )
        });
        // A map keeps the capacity of its busiest moment; a connection is idle for most of its
        // life.
        let stream = self.streams.remove(&id);
        if self.streams.is_empty() {
            self.streams = HashMap::new();
        }
        stream.map(|stream| (stream, answer))
    }
}

/// In the words of Go's server.
fn deadline_exceeded() -> Status {
    ttrpc::get_status(Code::DEADLINE_EXCEEDED, "context deadline exceeded")
}

//! One connection: reads requests, runs each in a task, writes the answers. Owns the rules on stream ids.
//! When the peer goes, so do the tasks that nobody waits for any more.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use protobuf::Message;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::task::{Id, JoinError, JoinSet};
use tracing::{debug, error, warn};
use ttrpc::{Code, Request, Status};

use super::reader::{Frame, FrameReader};
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
}

/// Serves until the peer leaves.
pub(super) async fn run<H: Handler>(stream: UnixStream, handler: Arc<H>) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut reader = FrameReader::new(read);
    let mut calls = Calls::default();
    let mut last_stream = 0;
    loop {
        tokio::select! {
            Some(ended) = calls.tasks.join_next_with_id() => {
                if let Some((stream, answer)) = calls.take(ended) {
                    write.write_all(&frame::response(stream, answer)).await?;
                }
            }
            frame = reader.next() => {
                let Some(frame) = frame? else { return Ok(()) };
                if let Err((stream, refusal)) = receive(frame, &mut last_stream, &mut calls, &handler) {
                    warn!(stream, code = ?refusal.code(), text = refusal.message, "frame refused");
                    write.write_all(&frame::response(stream, Err(refusal))).await?;
                }
            }
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
    begin(header, &payload, calls, handler).map_err(|refusal| (header.stream, refusal))
}

/// Starts the call that a request frame asks for.
fn begin<H: Handler>(
    header: Header,
    payload: &[u8],
    calls: &mut Calls,
    handler: &Arc<H>,
) -> Result<(), Status> {
    let request = Request::parse_from_bytes(payload)
        .map_err(|error| status::invalid(format!("unmarshal request error: {error}")))?;
    if calls.tasks.len() >= MAX_CALLS {
        let text = format!("{MAX_CALLS} calls are under way on this connection");
        return Err(ttrpc::get_status(Code::RESOURCE_EXHAUSTED, text));
    }
    let limit = u64::try_from(request.timeout_nano)
        .ok()
        .filter(|&nanos| nanos > 0)
        .map(Duration::from_nanos);
    let handler = Arc::clone(handler);
    let call = call_of(request, Arc::clone(&calls.session));
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

fn call_of(request: Request, session: Arc<Session>) -> Call {
    let mut metadata = HashMap::new();
    for pair in request.metadata {
        metadata.entry(pair.key).or_insert(pair.value);
    }
    Call {
        service: request.service,
        method: request.method,
        payload: request.payload,
        metadata,
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

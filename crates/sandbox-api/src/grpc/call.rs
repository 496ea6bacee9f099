//! One call on one HTTP/2 stream: from its request to its answer or its status.

use std::future::poll_fn;
use std::sync::Arc;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::debug;

use super::message::{PREFIX, framed, unframed};
use super::status::{Code, Status};
use super::{Call, Handler, MAX_MESSAGE};

const CONTENT_TYPE: &str = "application/grpc";
pub(crate) const STATUS: &str = "grpc-status";
pub(crate) const TEXT: &str = "grpc-message";
/// The metadata that names containerd's namespace.
pub(crate) const NAMESPACE: &str = "containerd-namespace";

/// The type of every message.
pub(crate) fn content_type() -> HeaderValue {
    HeaderValue::from_static(CONTENT_TYPE)
}

/// Answers one call. `room` has a permit for each byte of messages that this process may hold. When
/// `left` completes, the call is answered as one that its client has to repeat: containerd takes
/// any other failure of a `Wait`, a reset stream too, for the end of the pod.
pub(crate) async fn answer<H: Handler + ?Sized>(
    handler: &H,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    room: Arc<Semaphore>,
    left: impl Future<Output = ()>,
) {
    let (parts, body) = request.into_parts();
    let kind = parts.headers.get(http::header::CONTENT_TYPE);
    let is_grpc = kind.is_some_and(|kind| kind.as_bytes().starts_with(CONTENT_TYPE.as_bytes()));
    if parts.method != Method::POST || !is_grpc {
        let mut refusal = Response::new(());
        *refusal.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        let _ = respond.send_response(refusal, true);
        return;
    }
    let namespace = parts.headers.get(NAMESPACE);
    let namespace = namespace.and_then(|value| value.to_str().ok());
    let (path, namespace) = (
        parts.uri.path().to_owned(),
        namespace.unwrap_or_default().to_owned(),
    );
    let work = async {
        let (message, _held) = read(body, room).await?;
        let call = Call {
            path: path.clone(),
            namespace,
            message,
        };
        handler.call(call).await
    };
    let result = tokio::select! {
        result = work => result,
        () = left => Err(Status::new(Code::Unavailable, "this embedshimd leaves")),
        // The client has given it up, or is gone.
        _ = poll_fn(|context| respond.poll_reset(context)) => {
            debug!(path, "a client has given up a call");
            return;
        }
    };
    if let Err(error) = send(respond, result) {
        debug!(path, %error, "cannot send an answer");
    }
}

/// The one message of a request, and the room that it takes.
async fn read(
    mut body: RecvStream,
    room: Arc<Semaphore>,
) -> Result<(Vec<u8>, Option<OwnedSemaphorePermit>), Status> {
    let mut held: Option<OwnedSemaphorePermit> = None;
    let mut bytes = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.map_err(|error| Status::new(Code::Unavailable, error.to_string()))?;
        if bytes.len() + data.len() > MAX_MESSAGE + PREFIX {
            return Err(Status::new(
                Code::ResourceExhausted,
                format!("the message has more than {MAX_MESSAGE} bytes"),
            ));
        }
        let count = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let more = Arc::clone(&room).try_acquire_many_owned(count);
        let more = more.map_err(|_| {
            Status::new(
                Code::ResourceExhausted,
                "too many requests are read at once",
            )
        })?;
        match &mut held {
            Some(held) => held.merge(more),
            None => held = Some(more),
        }
        bytes.extend_from_slice(&data);
        let _ = body.flow_control().release_capacity(data.len());
    }
    Ok((unframed(bytes)?, held))
}

fn send(
    mut respond: SendResponse<Bytes>,
    result: Result<Vec<u8>, Status>,
) -> Result<(), h2::Error> {
    let mut response = Response::new(());
    let headers = response.headers_mut();
    headers.insert(http::header::CONTENT_TYPE, content_type());
    match result {
        Ok(message) => {
            let mut stream = respond.send_response(response, false)?;
            let framed = framed(&message).map_err(|_| Reason::INTERNAL_ERROR)?;
            stream.send_data(framed.into(), false)?;
            let mut trailers = HeaderMap::new();
            trailers.insert(STATUS, HeaderValue::from_static("0"));
            stream.send_trailers(trailers)
        }
        Err(status) => {
            headers.insert(STATUS, HeaderValue::from(status.code as u16));
            if let Ok(text) = HeaderValue::try_from(status.encoded()) {
                headers.insert(TEXT, text);
            }
            respond.send_response(response, true).map(drop)
        }
    }
}

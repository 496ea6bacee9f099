//! Which sandboxes containerd knows: `containerd.services.sandbox.v1.Store/List` of its own gRPC
//! service. containerd does not tell a controller of every sandbox that it gives up; it has each in
//! its store before the controller hears of it, and until the controller has removed it.

use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use embedshim_core::id::Namespace;
use h2::client::{SendRequest, handshake};
use http::{HeaderValue, Method, Request};
use protobuf::Message;
use tokio::net::UnixStream;

use crate::grpc::{self, MAX_MESSAGE};
use crate::messages::controller::ListResponse;

const LIST: &str = "http://containerd/containerd.services.sandbox.v1.Store/List";
/// The longest that it may take.
const LIMIT: Duration = Duration::from_secs(10);

/// The ids of all sandboxes in a namespace that the containerd at this socket knows.
pub async fn known_to_containerd(
    socket: &Path,
    namespace: &Namespace,
) -> io::Result<HashSet<String>> {
    let listed = tokio::time::timeout(LIMIT, list(socket, namespace));
    let listed = listed.await.map_err(io::Error::from)??;
    Ok(listed.list.into_iter().map(|one| one.sandbox_id).collect())
}

async fn list(socket: &Path, namespace: &Namespace) -> io::Result<ListResponse> {
    let stream = UnixStream::connect(socket).await?;
    let (client, connection) = handshake(stream).await.map_err(io::Error::other)?;
    // It ends when the client is dropped.
    let connection = tokio::spawn(connection);
    let asked = ask(client, namespace).await;
    connection.abort();
    let message = asked?;
    ListResponse::parse_from_bytes(&message).map_err(io::Error::other)
}

async fn ask(client: SendRequest<Bytes>, namespace: &Namespace) -> io::Result<Vec<u8>> {
    let mut client = client.ready().await.map_err(io::Error::other)?;
    let mut request = Request::new(());
    *request.method_mut() = Method::POST;
    *request.uri_mut() = http::Uri::from_static(LIST);
    let namespace = HeaderValue::try_from(namespace.as_str()).map_err(io::Error::other)?;
    let headers = request.headers_mut();
    headers.insert(http::header::CONTENT_TYPE, grpc::content_type());
    headers.insert(http::header::TE, HeaderValue::from_static("trailers"));
    headers.insert(grpc::NAMESPACE, namespace);
    let (response, mut stream) = client
        .send_request(request, false)
        .map_err(io::Error::other)?;
    // A request without fields is empty.
    let empty = grpc::framed(&[])?;
    stream
        .send_data(empty.into(), true)
        .map_err(io::Error::other)?;
    let (parts, mut body) = response.await.map_err(io::Error::other)?.into_parts();
    let mut bytes = Vec::new();
    while let Some(data) = body.data().await {
        let data = data.map_err(io::Error::other)?;
        if bytes.len() + data.len() > MAX_MESSAGE {
            return Err(io::Error::other("the list is longer than 16 MiB"));
        }
        bytes.extend_from_slice(&data);
        let _ = body.flow_control().release_capacity(data.len());
    }
    let trailers = body.trailers().await.map_err(io::Error::other)?;
    // A failure without a message has its status among the headers.
    let headers = trailers.unwrap_or(parts.headers);
    let code = headers.get(grpc::STATUS).map(HeaderValue::as_bytes);
    if code != Some(b"0") {
        let text = headers.get(grpc::TEXT);
        let text = text.map(|text| String::from_utf8_lossy(text.as_bytes()).into_owned());
        return Err(io::Error::other(text.unwrap_or_else(|| {
            "containerd has answered without a status".into()
        })));
    }
    grpc::unframed(bytes).map_err(|status| io::Error::other(status.text))
}

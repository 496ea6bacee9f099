//! [`Server`]: the connections of containerd's CRI. Owns their number and the way they end: a
//! server that leaves tells its clients, so that they send nothing more on a connection that goes.

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use embedshim_core::fdstore::{Listener, accept};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;
use tracing::{debug, warn};

use crate::grpc::{self, Handler};

/// containerd has one connection, and `ctr` one of its own.
const MAX_CONNECTIONS: usize = 64;
/// Each pod has one `Wait` in flight, on the one connection.
const MAX_STREAMS: u32 = 32_768;
/// The bytes of headers of one call.
const MAX_HEADERS: u32 = 16 * 1024;
/// What small frames may cost `h2` before it takes their sender for an attacker, 256 bytes for each
/// that is not read yet: one for each stream. Its default is enough for a hundred calls at once.
const SMALL_FRAMES: usize = 256 * MAX_STREAMS as usize;
/// The bytes of messages that are read at once.
const ROOM: usize = 64 * 1024 * 1024;
/// How long a client may take to begin.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long calls in flight have when the server leaves. What waits for a pod's end asks the next
/// daemon.
const GRACE: Duration = Duration::from_millis(100);
/// How long their clients have to read the answers.
const FAREWELL: Duration = Duration::from_millis(500);
/// Before the next attempt to accept where descriptors are scarce.
const RETRY: Duration = Duration::from_millis(100);

/// Serves a handler on a listener.
pub struct Server {
    shared: Arc<Shared>,
    accepting: Mutex<Option<AbortHandle>>,
}

struct Shared {
    handler: Arc<dyn Handler>,
    leaving: watch::Sender<bool>,
    slots: Arc<Semaphore>,
    room: Arc<Semaphore>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").finish_non_exhaustive()
    }
}

impl Server {
    /// A server that does not listen yet.
    pub fn new(handler: impl Handler) -> Self {
        Self {
            shared: Arc::new(Shared {
                handler: Arc::new(handler),
                leaving: watch::Sender::new(false),
                slots: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
                room: Arc::new(Semaphore::new(ROOM)),
            }),
            accepting: Mutex::default(),
        }
    }

    /// Accepts from this listener, and from no former one. Needs a tokio runtime.
    pub fn listen(&self, listener: Listener) {
        let accepting = tokio::spawn(accept_all(Arc::clone(&self.shared), listener));
        self.replace(Some(accepting.abort_handle()));
    }

    /// Accepts no more, tells all clients to come back, and waits for calls in flight for a moment.
    pub async fn leave(&self) {
        self.replace(None);
        self.shared.leaving.send_replace(true);
        let all = u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX);
        // Without an error: the semaphore is never closed.
        let _ = tokio::time::timeout(FAREWELL, self.shared.slots.acquire_many(all)).await;
    }

    fn replace(&self, next: Option<AbortHandle>) {
        let mut accepting = self
            .accepting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(former) = std::mem::replace(&mut *accepting, next) {
            former.abort();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.replace(None);
    }
}

async fn accept_all(shared: Arc<Shared>, listener: Listener) {
    loop {
        let Ok(slot) = Arc::clone(&shared.slots).acquire_owned().await else {
            return;
        };
        let stream = loop {
            match accept_one(&listener).await {
                Ok(Some(stream)) => break stream,
                Ok(None) => {}
                Err(error) => {
                    warn!(%error, "sandbox controller: cannot accept a connection");
                    tokio::time::sleep(RETRY).await;
                }
            }
        };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            if let Err(error) = serve(&shared, stream).await {
                debug!(%error, "sandbox controller: a connection has ended");
            }
            drop(slot);
        });
    }
}

async fn accept_one(listener: &Listener) -> io::Result<Option<UnixStream>> {
    let waiting = listener.readable().await?;
    let Some(accepted) = waiting.accept(accept).await? else {
        return Ok(None);
    };
    let stream = UnixStream::from_std(StdStream::from(accepted))?;
    let peer = stream.peer_cred()?.uid();
    if peer != rustix::process::geteuid().as_raw() {
        warn!(
            user = peer,
            "sandbox controller: a peer of another user is refused"
        );
        return Ok(None);
    }
    Ok(Some(stream))
}

/// Serves one connection until its client or this server leaves.
async fn serve(shared: &Shared, stream: UnixStream) -> Result<(), h2::Error> {
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .data_frame_budget(SMALL_FRAMES);
    let handshake = tokio::time::timeout(HANDSHAKE, builder.handshake::<_, Bytes>(stream));
    let Ok(connection) = handshake.await else {
        debug!("sandbox controller: a client connects and says nothing");
        return Ok(());
    };
    let mut connection = connection?;
    let mut leaving = shared.leaving.subscribe();
    loop {
        let accepted = tokio::select! {
            accepted = connection.accept() => accepted,
            _ = leaving.wait_for(|leaving| *leaving) => break,
        };
        let Some(accepted) = accepted else {
            return Ok(());
        };
        let (request, respond) = accepted?;
        let (handler, room) = (Arc::clone(&shared.handler), Arc::clone(&shared.room));
        let mut leaving = shared.leaving.subscribe();
        tokio::spawn(async move {
            let left = async {
                let _ = leaving.wait_for(|leaving| *leaving).await;
                tokio::time::sleep(GRACE).await;
            };
            grpc::answer(handler.as_ref(), request, respond, room, left).await;
        });
    }
    connection.graceful_shutdown();
    let rest = async {
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            respond.send_reset(h2::Reason::REFUSED_STREAM);
        }
    };
    let _ = tokio::time::timeout(FAREWELL, rest).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use http::{HeaderMap, Request};
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::grpc::{Call, Status, framed, unframed};

    /// Answers what it is asked, but for a `Wait`, which never ends.
    struct Echo;

    #[async_trait]
    impl Handler for Echo {
        async fn call(&self, call: Call) -> Result<Vec<u8>, Status> {
            if call.path == "/s/Wait" {
                std::future::pending::<()>().await;
            }
            Ok(call.message)
        }
    }

    async fn client(path: &std::path::Path) -> h2::client::SendRequest<Bytes> {
        let stream = UnixStream::connect(path).await.unwrap();
        let (client, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        client.ready().await.unwrap()
    }

    /// The status and the bytes of the answer to these bytes.
    async fn ask(
        client: &mut h2::client::SendRequest<Bytes>,
        path: &str,
        bytes: Vec<u8>,
    ) -> (String, Vec<u8>) {
        let request = Request::post(format!("http://x{path}"))
            .header("content-type", "application/grpc")
            .body(())
            .unwrap();
        let (response, mut stream) = client.send_request(request, false).unwrap();
        stream.send_data(bytes.into(), true).unwrap();
        let (parts, mut body) = response.await.unwrap().into_parts();
        let mut answer = Vec::new();
        while let Some(data) = body.data().await {
            answer.extend_from_slice(&data.unwrap());
        }
        let trailers: Option<HeaderMap> = body.trailers().await.unwrap();
        let headers = trailers.unwrap_or(parts.headers);
        let status = headers["grpc-status"].to_str().unwrap().to_owned();
        (status, answer)
    }

    fn serve(path: &std::path::Path) -> Server {
        let server = Server::new(Echo);
        server.listen(Listener::new(UnixListener::bind(path).unwrap()).unwrap());
        server
    }

    #[tokio::test]
    async fn a_call_is_one_message_and_its_answer_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _server = serve(&path);
        let mut client = client(&path).await;
        let (status, answer) = ask(&mut client, "/s/Echo", framed(b"hello").unwrap()).await;
        assert_eq!(
            (status.as_str(), unframed(answer).unwrap().as_slice()),
            ("0", &b"hello"[..])
        );
        let mut compressed = framed(b"x").unwrap();
        compressed[0] = 1;
        for (bytes, expected) in [(Vec::new(), "3"), (compressed, "12"), (vec![0; 4], "3")] {
            assert_eq!(ask(&mut client, "/s/Echo", bytes).await.0, expected);
        }
        let (status, _) = ask(&mut client, "/s/Echo", framed(b"again").unwrap()).await;
        assert_eq!(status, "0", "the connection goes on");
    }

    /// Anything else would be the end of the pod to containerd.
    #[tokio::test]
    async fn a_wait_is_unavailable_when_the_server_leaves() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let server = serve(&path);
        let mut client = client(&path).await;
        let wait = ask(&mut client, "/s/Wait", framed(b"").unwrap());
        let leave = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            server.leave().await;
        };
        let ((status, _), ()) = tokio::join!(wait, leave);
        assert_eq!(status, "14");
    }

    #[tokio::test]
    async fn a_message_beyond_the_limit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _server = serve(&path);
        let mut client = client(&path).await;
        let huge = vec![0; grpc::MAX_MESSAGE + 100];
        assert_eq!(ask(&mut client, "/s/Echo", huge).await.0, "8");
    }
}

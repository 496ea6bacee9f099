//! [`Server`]: ttrpc over our own connections, with the manners of Go's server. Owns accepting and framing;
//! what a call means is its [`Handler`]'s.
//!
//! containerd opens one connection for each container and never lets go of it, so an idle connection is one small tokio
//! task and no buffer.

mod connection;
mod reader;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use embedshim_core::id::Namespace;
use tokio::net::{UnixListener, UnixStream};
use tracing::{debug, warn};
use ttrpc::Status;

/// After a failed accept: descriptors or memory are short, and the next attempt would fail at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// One call, as it came off the wire.
#[derive(Clone, Debug)]
pub struct Call {
    /// Full name, such as `containerd.task.v2.Task`.
    pub service: String,
    /// Such as `Create`.
    pub method: String,
    /// The request message.
    pub payload: Vec<u8>,
    /// ttrpc's metadata, the first value of each key.
    pub metadata: HashMap<String, String>,
    /// The connection it came on.
    pub session: Arc<Session>,
}

/// What is remembered of a connection.
#[derive(Debug, Default)]
pub struct Session {
    /// The namespace of its calls, once one of them has told it. containerd uses a connection for one container only.
    pub namespace: OnceLock<Namespace>,
}

/// What answers calls.
///
/// A future is dropped when its caller has gone or its deadline has passed: what must not be left half done has to run in a
/// task of its own.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Answers one call with a message or with an error.
    async fn call(&self, call: Call) -> Result<Vec<u8>, Status>;
}

/// A ttrpc server.
#[derive(Debug)]
pub struct Server<H> {
    handler: Arc<H>,
}

impl<H: Handler> Server<H> {
    /// A server whose calls `handler` answers.
    pub fn new(handler: H) -> Self {
        Self {
            handler: Arc::new(handler),
        }
    }

    /// Accepts connections until `stop` completes; the connections end with the runtime.
    pub async fn serve(&self, listener: UnixListener, stop: impl Future<Output = ()>) {
        tokio::pin!(stop);
        loop {
            tokio::select! {
                () = &mut stop => return,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => self.admit(stream),
                    Err(error) => {
                        warn!(%error, "cannot accept a connection; trying again");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }

    fn admit(&self, stream: UnixStream) {
        if let Err(error) = check_peer(&stream) {
            warn!(%error, "connection refused");
            return;
        }
        let handler = Arc::clone(&self.handler);
        tokio::spawn(async move {
            if let Err(error) = connection::run(stream, handler).await {
                debug!(%error, "connection ended");
            }
        });
    }
}

#[cfg(fuzzing)]
pub(crate) async fn converse<H: Handler>(stream: UnixStream, handler: Arc<H>) -> io::Result<()> {
    connection::run(stream, handler).await
}

/// Only our own user may speak to us, as with Go's shims (`UnixSocketRequireSameUser`).
fn check_peer(stream: &UnixStream) -> io::Result<()> {
    let peer = stream.peer_cred()?.uid();
    let own = nix::unistd::geteuid().as_raw();
    if peer == own {
        Ok(())
    } else {
        Err(io::Error::other(format!(
            "the peer is user {peer}, this daemon serves user {own} only"
        )))
    }
}

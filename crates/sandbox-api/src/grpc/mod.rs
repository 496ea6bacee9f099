//! gRPC's unary calls over HTTP/2: what is above a connection's frames and below a message's
//! meaning. Owns the limits of what a client can make this process hold. Compression, streaming and
//! deadlines in headers are not needed by the one client: a client that gives up resets its stream.

mod call;
mod message;
mod status;

use async_trait::async_trait;

pub(crate) use call::{NAMESPACE, STATUS, TEXT, answer, content_type};
pub(crate) use message::{framed, unframed};
pub use status::{Code, Status};

/// The longest message that is read: containerd sends none that is longer.
pub(crate) const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// A call, as its handler sees it.
#[derive(Debug)]
pub struct Call {
    /// The service and its method, such as `/package.Service/Method`.
    pub path: String,
    /// containerd's namespace, in the call's metadata; empty if it names none.
    pub namespace: String,
    /// The message.
    pub message: Vec<u8>,
}

/// Answers calls.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Answers this one. Dropped when the client has given it up.
    async fn call(&self, call: Call) -> Result<Vec<u8>, Status>;
}

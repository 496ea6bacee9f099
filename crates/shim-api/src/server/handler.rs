//! [`Handler`]: what answers calls. Owns what a call is: the request, and the connection that it
//! came on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use async_trait::async_trait;
use embedshim_core::id::{ContainerId, Namespace};
use embedshim_core::task::{BundleId, RequestId};
use ttrpc::Status;

use super::outcomes::Outcomes;

/// What answers calls.
///
/// A future is dropped when its client has closed the connection or its deadline has passed: what
/// must not be left half done has to run in a task of its own.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Answers one call with a message or with an error.
    async fn call(&self, call: Call) -> Result<Vec<u8>, Status>;
}

/// One call, as it was read from its connection.
#[derive(Clone, Debug)]
pub struct Call {
    /// The full name of a service, such as `containerd.task.v2.Task`.
    pub service: String,
    /// The name of one of its methods, such as `Create`.
    pub method: String,
    /// The request message.
    pub payload: Vec<u8>,
    /// ttrpc's metadata, the first value of each key.
    pub metadata: HashMap<String, String>,
    /// Which request it is, if its connection outlives this process.
    pub request: Option<RequestId>,
    /// Another daemon read this request and died before it was answered: it may be carried out, or
    /// half carried out.
    pub is_replay: bool,
    /// Notes an answer that could not be given again, if its connection outlives this process.
    pub outcomes: Option<Outcomes>,
    /// The connection it came on.
    pub session: Arc<Session>,
}

/// What is known of a connection beside its calls.
#[derive(Debug, Default)]
pub struct Session {
    /// The namespace of its calls, once one of them has named it. containerd uses a connection for
    /// one container only.
    pub namespace: OnceLock<Namespace>,
    /// The last `Create` of this connection, whether or not it succeeded.
    pub creation: Mutex<Option<Creation>>,
    /// A daemon before this one knew the namespace, and its note of it is damaged.
    pub is_namespace_lost: bool,
    /// Why this connection ends with this process though others do not. No container is created on
    /// it: containerd destroys the container of a connection that is lost.
    pub not_stored: OnceLock<String>,
}

impl Session {
    /// The last `Create` of this connection.
    pub fn creation(&self) -> MutexGuard<'_, Option<Creation>> {
        self.creation.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a container was to be created from. The calls of that connection mean no container of
/// another bundle, though it has the same id: two containerds can use one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Creation {
    /// The container's id.
    pub id: ContainerId,
    /// The directory that is its bundle.
    pub bundle: BundleId,
}

//! [`Handler`]: what answers calls. Owns what a call is: the request, the connection that it came
//! on, and the way of its answer into the connection's journal.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use async_trait::async_trait;
use embedshim_core::id::{ContainerId, Namespace};
use embedshim_core::task::{BundleId, RequestId};
use tokio::sync::{mpsc, oneshot};
use ttrpc::Status;

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
    /// Which request it is, if its connection is kept.
    pub request: Option<RequestId>,
    /// Another daemon took this call and died before it was answered: perhaps it is done, or half
    /// done.
    pub is_again: bool,
    /// Where an answer goes whose evidence is about to be removed, if its connection is kept.
    pub outcomes: Option<Outcomes>,
    /// The connection it came on.
    pub session: Arc<Session>,
}

/// What is remembered of a connection.
#[derive(Debug, Default)]
pub struct Session {
    /// The namespace of its calls, once one of them has told it. containerd uses a connection for
    /// one container only.
    pub namespace: OnceLock<Namespace>,
    /// The last `Create` of this connection, whatever it was answered.
    pub creation: Mutex<Option<Creation>>,
    /// A daemon before this one knew the namespace, and its note of it is damaged.
    pub is_namespace_lost: bool,
    /// Why it will be lost with this process though others are not. No container may depend on it.
    pub not_kept: OnceLock<String>,
}

/// What a container was to be created from. No container of another bundle is meant by the calls of
/// that connection, though it has the same id: two containerds can use one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Creation {
    /// The container's.
    pub id: ContainerId,
    /// Its bundle.
    pub bundle: BundleId,
}

impl Session {
    /// The last `Create`.
    pub fn creation(&self) -> MutexGuard<'_, Option<Creation>> {
        self.creation.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What answers calls.
///
/// A future is dropped when its caller has gone or its deadline has passed: what must not be left
/// half done has to run in a task of its own.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// Answers one call with a message or with an error.
    async fn call(&self, call: Call) -> Result<Vec<u8>, Status>;
}

/// The way of an answer into the journal before it is given: for a deletion, after which nobody
/// could tell any more how the process ended.
#[derive(Clone, Debug)]
pub struct Outcomes {
    pub(super) stream: u32,
    pub(super) sender: mpsc::Sender<Outcome>,
}

/// An answer that is to be noted.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) stream: u32,
    pub(super) answer: Vec<u8>,
    pub(super) noted: oneshot::Sender<()>,
}

impl Outcomes {
    /// Returns when the answer is noted, or when its connection is gone and nobody waits for it.
    pub async fn note(&self, answer: Vec<u8>) {
        let (noted, is_noted) = oneshot::channel();
        let outcome = Outcome {
            stream: self.stream,
            answer,
            noted,
        };
        if self.sender.send(outcome).await.is_ok() {
            let _ = is_noted.await;
        }
    }
}

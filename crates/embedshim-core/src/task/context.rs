//! [`RequestContext`]: the request that an operation is done for. Owns how a request is recognised
//! that a predecessor has begun and not answered; what that means for an operation is the
//! operation's.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::task::api::Deleted;

/// Which request: the connection that it came on and its number there. No two requests of a boot
/// have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RequestId {
    /// The connection.
    pub connection: u64,
    /// ttrpc's stream, say.
    pub stream: u32,
}

/// Hears what a deletion is about to answer, before the last trace is removed from which it could
/// be learned again.
#[async_trait]
pub trait DeleteObserver: fmt::Debug + Send + Sync {
    /// The task or exec was deleted; returns when that is noted.
    async fn deleted(&self, deleted: Deleted);
}

/// The request that an operation is done for. The default is none: of a caller that will not ask
/// again after a restart.
#[derive(Clone, Debug, Default)]
pub struct RequestContext {
    /// The request. Operations leave it in the records of what they have done.
    pub request: Option<RequestId>,
    /// A predecessor has begun with this request and died before it was answered. What it has done
    /// is answered, not done again.
    pub is_replay: bool,
    /// Notes what a deletion will answer.
    pub observer: Option<Arc<dyn DeleteObserver>>,
}

impl RequestContext {
    /// Whether this request, before a restart, is the one that left this mark.
    pub(crate) fn is_retry_of(&self, mark: Option<RequestId>) -> bool {
        self.is_replay && self.request.is_some() && self.request == mark
    }
}

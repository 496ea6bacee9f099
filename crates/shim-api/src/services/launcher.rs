//! `embedshim.v1.Launcher`: what our own launcher asks the daemon. JSON, since both ends are ours and of one release
//! or of two that follow each other: unknown fields are ignored.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use embedshim_core::id::{ContainerId, Namespace, TaskKey};
use embedshim_core::task::{Cleaned, Node};
use serde::{Deserialize, Serialize};
use ttrpc::Status;

use crate::server::Call;
use crate::status;

/// The service's name on the wire.
pub(crate) const NAME: &str = "embedshim.v1.Launcher";
/// Its one method: containerd has given this bundle up.
pub(crate) const CLEANUP: &str = "Cleanup";

/// The request of `Cleanup`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CleanupRequest {
    pub(crate) namespace: String,
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
}

/// Its answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum CleanupResponse {
    /// How the init ended.
    Removed(Removed),
    /// The daemon has never heard of it, or not any more.
    Unknown,
    /// The id is somebody else's by now.
    Replaced,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Removed {
    pub(crate) pid: u32,
    pub(crate) exit_status: u32,
    /// Since the epoch.
    exited_at: Duration,
}

impl Removed {
    /// Of a time that is none, the epoch.
    pub(crate) fn exited_at(&self) -> SystemTime {
        UNIX_EPOCH.checked_add(self.exited_at).unwrap_or(UNIX_EPOCH)
    }
}

#[derive(Debug)]
pub(crate) struct LauncherService {
    node: Node,
}

impl LauncherService {
    pub(crate) fn new(node: Node) -> Self {
        Self { node }
    }

    pub(crate) async fn call(&self, call: &Call) -> Result<Vec<u8>, Status> {
        if call.method != CLEANUP {
            return Err(status::unknown_method(&call.method));
        }
        let request: CleanupRequest = serde_json::from_slice(&call.payload)
            .map_err(|error| status::invalid(format!("unmarshal request error: {error}")))?;
        let response = self.cleanup(request).await.map_err(status::from)?;
        serde_json::to_vec(&response).map_err(|error| status::internal(error.to_string()))
    }

    async fn cleanup(
        &self,
        request: CleanupRequest,
    ) -> Result<CleanupResponse, embedshim_core::Error> {
        let namespace: Namespace = request.namespace.parse()?;
        let id: ContainerId = request.id.parse()?;
        let cleaned = self
            .node
            .cleanup(&TaskKey { namespace, id }, &request.bundle)
            .await?;
        Ok(match cleaned {
            Cleaned::Unknown => CleanupResponse::Unknown,
            Cleaned::Replaced => CleanupResponse::Replaced,
            Cleaned::Removed { pid, exit } => CleanupResponse::Removed(Removed {
                pid,
                exit_status: exit.code,
                exited_at: exit.at.duration_since(UNIX_EPOCH).unwrap_or_default(),
            }),
        })
    }
}

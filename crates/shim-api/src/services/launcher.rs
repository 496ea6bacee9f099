//! `embedshim.v1.Launcher`: what the launcher asks the daemon. JSON, since both ends are of one
//! release of embedshim or of two that follow each other: unknown fields are ignored.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use embedshim_core::id::{ContainerId, Namespace, TaskKey};
use embedshim_core::task::{Cleaned, Node};
use serde::{Deserialize, Serialize};
use ttrpc::Status;

use crate::server::Call;
use crate::status;

/// The name of the service on the wire.
pub(crate) const NAME: &str = "embedshim.v1.Launcher";
/// The name of its one method: containerd has given a bundle up.
pub(crate) const CLEANUP: &str = "Cleanup";

/// The request of `Cleanup`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CleanupRequest {
    pub(crate) namespace: String,
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
}

/// The answer of `Cleanup`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum CleanupResponse {
    /// The container was there and is removed.
    Removed(Removed),
    /// The daemon has no container of this id.
    Unknown,
    /// The container of this id has another bundle.
    Replaced,
}

/// How the init of a removed container ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Removed {
    pub(crate) pid: u32,
    pub(crate) exit_status: u32,
    /// The time since the epoch.
    exited_at: Duration,
}

impl Removed {
    /// When it ended; the epoch if the time cannot be represented.
    pub(crate) fn exited_at(&self) -> SystemTime {
        UNIX_EPOCH.checked_add(self.exited_at).unwrap_or(UNIX_EPOCH)
    }
}

/// The service of one node.
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

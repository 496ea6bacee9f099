//! [`Services`]: which service answers a call. A call to any other service is unimplemented, in the
//! words of Go's server: containerd 2.x falls back to an older API on that code.

pub(crate) mod any;
mod context;
pub(crate) mod create;
pub(crate) mod launcher;
mod metrics;
pub(crate) mod options;
mod pods;
mod subject;
mod task;
pub(crate) mod timestamp;

use async_trait::async_trait;
use embedshim_core::task::Node;
use ttrpc::{Code, Status};

use crate::server::{Call, Handler};
use launcher::LauncherService;
pub use pods::Pods;
pub use subject::Subject;
use task::TaskService;

/// The Task service has two names and the same messages: containerd 1.x calls the first, and 2.x
/// the one of the bootstrap's protocol version (`core/runtime/v2/bridge.go`).
const TASK: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// The one call that lasts as long as a process.
const WAIT: &str = "Wait";

/// The services of a daemon.
#[derive(Debug)]
pub struct Services {
    task: TaskService,
    launcher: LauncherService,
}

impl Services {
    /// The services of a daemon, for the tasks of this node.
    pub fn new(node: Node) -> Self {
        Self {
            task: TaskService::new(node.clone()),
            launcher: LauncherService::new(node),
        }
    }

    /// The same, which create containers in these pods as well.
    pub fn with_pods(self, pods: Pods) -> Self {
        let task = self.task.with_pods(pods);
        Self { task, ..self }
    }
}

#[async_trait]
impl Handler for Services {
    async fn call(&self, call: Call) -> Result<Vec<u8>, Status> {
        if TASK.contains(&call.service.as_str()) && call.method == WAIT {
            let ended = self.task.wait(&call)?;
            drop(call);
            return ended.await;
        }
        // A Wait lasts as long as its process: what the others need meanwhile is no part of it.
        Box::pin(self.answer(call)).await
    }
}

impl Services {
    async fn answer(&self, call: Call) -> Result<Vec<u8>, Status> {
        match call.service.as_str() {
            service if TASK.contains(&service) => self.task.call(&call).await,
            launcher::NAME => self.launcher.call(&call).await,
            other => Err(ttrpc::get_status(
                Code::UNIMPLEMENTED,
                format!("service {other}"),
            )),
        }
    }
}

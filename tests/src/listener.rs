//! [`Listener`]: the side of containerd that takes events, for tests that run without one.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::events::task::{TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM};
use containerd_shim_protos::{Events, create_events};
use protobuf::Message;
use ttrpc::{Server, TtrpcContext};

/// One event: its topic without `/tasks/`, the container, and the exec if it is about one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heard {
    /// `create`, `exit` ...
    pub topic: String,
    /// Which container.
    pub container: String,
    /// Which exec.
    pub exec: Option<String>,
    /// With which code it ended.
    pub code: Option<u32>,
}

/// A server for events.
pub struct Listener {
    heard: Arc<Mutex<Vec<Heard>>>,
    path: PathBuf,
    server: Server,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

#[derive(Clone)]
struct Ear(Arc<Mutex<Vec<Heard>>>);

impl Events for Ear {
    fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let topic = request
            .envelope
            .topic
            .trim_start_matches("/tasks/")
            .to_owned();
        let heard = parse(&topic, &request.envelope.event.value);
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(heard);
        Ok(Empty::new())
    }
}

fn parse(topic: &str, value: &[u8]) -> Heard {
    let (container, exec, code) = match topic {
        "exec-added" => {
            let added = TaskExecAdded::parse_from_bytes(value).unwrap_or_default();
            (added.container_id, Some(added.exec_id), None)
        }
        "exec-started" => {
            let started = TaskExecStarted::parse_from_bytes(value).unwrap_or_default();
            (started.container_id, Some(started.exec_id), None)
        }
        "exit" => {
            let exit = TaskExit::parse_from_bytes(value).unwrap_or_default();
            let exec = Some(exit.id).filter(|id| *id != exit.container_id);
            (exit.container_id, exec, Some(exit.exit_status))
        }
        // The others have the container in the same field, and nothing else that counts here.
        _ => (
            TaskOOM::parse_from_bytes(value)
                .unwrap_or_default()
                .container_id,
            None,
            None,
        ),
    };
    Heard {
        topic: topic.into(),
        container,
        exec,
        code,
    }
}

impl Listener {
    /// Listens on a socket in `directory`.
    pub fn listen(directory: &Path) -> anyhow::Result<Self> {
        let path = directory.join("events.ttrpc");
        let heard: Arc<Mutex<Vec<Heard>>> = Arc::default();
        let service = create_events(Arc::new(Ear(Arc::clone(&heard))));
        let mut server = Server::new()
            .bind(&format!("unix://{}", path.display()))?
            .register_service(service);
        server.start()?;
        Ok(Self {
            heard,
            path,
            server,
        })
    }

    /// Its socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What was heard so far.
    pub fn heard(&self) -> Vec<Heard> {
        self.heard
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Waits for its threads, which wait for nothing else any more.
        std::mem::take(&mut self.server).shutdown();
    }
}

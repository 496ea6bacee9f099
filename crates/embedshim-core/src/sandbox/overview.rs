//! What an operator sees of sandboxes at one moment: [`SandboxOverview`] and its parts. Owns the
//! shapes, and how they are read from memory; only the look at pins goes to the file system.

use std::path::PathBuf;
use std::time::SystemTime;

use crate::id::SandboxKey;
use crate::sandbox::api::{Ended, Network, Processes};
use crate::sandbox::namespaces::is_pinned;
use crate::sandbox::sandbox::{Sandbox, State};

/// A sandbox at one moment.
#[derive(Clone, Debug)]
pub struct SandboxOverview {
    /// Its name.
    pub key: SandboxKey,
    /// What tells its pod from all others.
    pub name: String,
    /// How far it is.
    pub state: SandboxState,
    /// When it was created.
    pub created_at: SystemTime,
    /// Its namespaces.
    pub namespaces: Vec<SandboxNamespace>,
    /// The files that its containers share, each with where it is in a container.
    pub mounts: Vec<(PathBuf, PathBuf)>,
    /// The init process of a pod whose containers share their processes, if it has begun.
    pub init_pid: Option<i32>,
    /// Its record; a sandbox that was not started has none.
    pub record: Option<PathBuf>,
}

/// How far a sandbox is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SandboxState {
    /// It was not started yet.
    Created,
    /// Containers can be started in it.
    Ready,
    /// A daemon has died in its stop, which this one finishes.
    Ending,
    /// It was stopped, or has lost its namespaces.
    Ended(Ended),
}

/// A namespace as the containers of a sandbox have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxNamespace {
    /// As `/proc/PID/ns` names it: `net`, `ipc`, `uts`, `pid`, `user`.
    pub name: &'static str,
    /// Whose it is.
    pub owner: NamespaceOwner,
}

/// Whose a namespace is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NamespaceOwner {
    /// The sandbox's, which is pinned at this path while the sandbox is ready.
    Pod(PathBuf),
    /// Each container has its own.
    Container,
    /// The node's.
    Node,
}

impl SandboxNamespace {
    /// Whether it is pinned; `None` if it is not the sandbox's. Blocks on the file system.
    pub fn is_pinned(&self) -> Option<bool> {
        match &self.owner {
            NamespaceOwner::Pod(pin) => Some(is_pinned(pin)),
            NamespaceOwner::Container | NamespaceOwner::Node => None,
        }
    }
}

impl SandboxOverview {
    /// `record` is where the record would be; `None` for a sandbox that is gone.
    pub(super) fn of(sandbox: &Sandbox, record: PathBuf) -> Option<Self> {
        let state = match sandbox.state() {
            State::Created(_) => SandboxState::Created,
            State::Ready => SandboxState::Ready,
            State::Ending(_) => SandboxState::Ending,
            State::Ended(ended) => SandboxState::Ended(ended),
            State::Leaving | State::Gone => return None,
        };
        Some(Self {
            key: sandbox.key.clone(),
            name: sandbox.name.clone(),
            state,
            created_at: sandbox.snapshot().created_at,
            namespaces: namespaces(sandbox),
            mounts: sandbox.place.mounts(sandbox.isolation.ipc),
            init_pid: sandbox.init.get().map(|init| init.identity.pid),
            record: (state != SandboxState::Created).then_some(record),
        })
    }
}

fn namespaces(sandbox: &Sandbox) -> Vec<SandboxNamespace> {
    let isolation = &sandbox.isolation;
    let net = match &isolation.network {
        Network::Pod(path) => NamespaceOwner::Pod(path.clone()),
        Network::Node => NamespaceOwner::Node,
    };
    let other = |name| {
        let owner = if isolation.pinned().any(|own| own == name) {
            NamespaceOwner::Pod(sandbox.place.pin(name))
        } else if name == "pid" && isolation.processes == Processes::Container {
            NamespaceOwner::Container
        } else {
            NamespaceOwner::Node
        };
        SandboxNamespace { name, owner }
    };
    let net = SandboxNamespace {
        name: "net",
        owner: net,
    };
    let others = ["ipc", "uts", "pid", "user"].map(other);
    [net].into_iter().chain(others).collect()
}

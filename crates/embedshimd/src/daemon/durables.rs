//! What the daemon has in its state directory, each as a [`Durable`]: the one list of all of them
//! is [`all`]. Owns how each is recreated from what this process knows.

use std::cell::RefCell;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use async_trait::async_trait;
use embedshim_core::fdstore::{FdName, FdStore, Listener};
use embedshim_core::task::Node;
use nix::fcntl::Flock;
use shim_api::events::Outboxes;
use shim_api::server::Server;
use shim_api::services::Services;
use tracing::warn;

use super::listener;
use super::oversight::Oversight;
use super::pods::PodService;
use crate::admin::Admin;
use crate::metrics::Observed;
use crate::service_manager::ServiceManager;
use crate::state_dir::durable::Durable;
use crate::state_dir::lives::Lives;
use crate::state_dir::lock;
use crate::traces::Traced;

/// How long the connections have to write their journals again.
const JOURNALS_LIMIT: Duration = Duration::from_secs(5);

/// The parts of the daemon that have files in the state directory.
pub(super) struct Parts<'a> {
    pub(super) state_dir: &'a Path,
    pub(super) socket: &'a Path,
    pub(super) server: &'a Server<Traced<Observed<Services>>>,
    pub(super) node: &'a Node,
    pub(super) outboxes: &'a Outboxes,
    pub(super) store: &'a dyn FdStore,
    pub(super) manager: Option<&'a ServiceManager>,
    pub(super) oversight: &'a Oversight,
    pub(super) pods: Option<&'a PodService>,
}

/// Everything durable. In the order in which it is recreated: a client that finds the socket finds
/// the rest. A recreated listener is put into `new_listener`.
pub(super) fn all<'a>(
    parts: &Parts<'a>,
    new_listener: &'a RefCell<Option<Listener>>,
) -> Vec<Box<dyn Durable + 'a>> {
    let state_dir = parts.state_dir;
    let mut all: Vec<Box<dyn Durable + 'a>> = vec![
        Box::new(LockFile {
            state_dir,
            path: lock::daemon_path(state_dir),
            locks: RefCell::default(),
        }),
        Box::new(TaskRecords {
            path: state_dir.join("tasks"),
            node: parts.node,
        }),
        Box::new(Journals {
            path: state_dir.join("connections"),
            server: parts.server,
        }),
        Box::new(Events {
            path: state_dir.join("events"),
            outboxes: parts.outboxes,
        }),
        Box::new(Socket {
            path: parts.socket,
            store: parts.store,
            new_listener,
        }),
    ];
    let oversight = parts.oversight;
    all.push(Box::new(History {
        lives: &oversight.lives,
    }));
    if let Some(admin) = &oversight.admin {
        all.push(Box::new(AdminSocket { admin }));
    }
    if let Some(pods) = parts.pods {
        all.push(Box::new(SandboxRecords {
            path: state_dir.join("sandboxes"),
            pods,
        }));
        all.push(Box::new(SandboxSocket {
            pods,
            store: parts.store,
        }));
    }
    if let Some(manager) = parts.manager {
        all.push(Box::new(KeeperFiles { manager }));
    }
    all
}

/// The lock that a second daemon is refused by.
struct LockFile<'a> {
    state_dir: &'a Path,
    path: PathBuf,
    /// The locks that were taken since the start. Former ones stay taken: a process that still has
    /// their file open must not get them.
    locks: RefCell<Vec<Flock<File>>>,
}

#[async_trait(?Send)]
impl Durable for LockFile<'_> {
    fn name(&self) -> &'static str {
        "the lock"
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }

    fn is_single_file(&self) -> bool {
        true
    }

    async fn recreate(&self) -> anyhow::Result<()> {
        let lock = lock::take(self.state_dir, &self.path)?
            .context("another daemon has taken it; stop one of the two")?;
        self.locks.borrow_mut().push(lock);
        Ok(())
    }
}

/// The records of tasks that a successor takes over.
struct TaskRecords<'a> {
    path: PathBuf,
    node: &'a Node,
}

#[async_trait(?Send)]
impl Durable for TaskRecords<'_> {
    fn name(&self) -> &'static str {
        "the task records"
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }

    async fn recreate(&self) -> anyhow::Result<()> {
        Ok(self.node.recreate_records().await?)
    }
}

/// The journals of connections, with the requests that are not answered yet.
struct Journals<'a> {
    path: PathBuf,
    server: &'a Server<Traced<Observed<Services>>>,
}

#[async_trait(?Send)]
impl Durable for Journals<'_> {
    fn name(&self) -> &'static str {
        "the connections' journals"
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }

    async fn recreate(&self) -> anyhow::Result<()> {
        match self.server.recreate_journals(JOURNALS_LIMIT).await {
            // A connection writes its journal again when its client has read: that is no failure.
            Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {
                warn!(
                    limit = ?JOURNALS_LIMIT,
                    "state directory: a connection has not recreated its journal: its client does \
                     not read"
                );
                Ok(())
            }
            recreated => Ok(recreated?),
        }
    }
}

/// The events that containerd has not acknowledged.
struct Events<'a> {
    path: PathBuf,
    outboxes: &'a Outboxes,
}

#[async_trait(?Send)]
impl Durable for Events<'_> {
    fn name(&self) -> &'static str {
        "the events for containerd"
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }

    async fn recreate(&self) -> anyhow::Result<()> {
        Ok(self.outboxes.recreate()?)
    }
}

/// The socket that containerd connects to.
struct Socket<'a> {
    path: &'a Path,
    store: &'a dyn FdStore,
    new_listener: &'a RefCell<Option<Listener>>,
}

#[async_trait(?Send)]
impl Durable for Socket<'_> {
    fn name(&self) -> &'static str {
        "the socket"
    }

    fn path(&self) -> Option<&Path> {
        Some(self.path)
    }

    fn is_single_file(&self) -> bool {
        true
    }

    async fn recreate(&self) -> anyhow::Result<()> {
        let listener = listener::recreate(&FdName::Listener, self.path, self.store)?;
        *self.new_listener.borrow_mut() = Some(listener);
        Ok(())
    }
}

/// The records of sandboxes that a successor takes over.
struct SandboxRecords<'a> {
    path: PathBuf,
    pods: &'a PodService,
}

#[async_trait(?Send)]
impl Durable for SandboxRecords<'_> {
    fn name(&self) -> &'static str {
        "the sandbox records"
    }

    fn path(&self) -> Option<&Path> {
        Some(&self.path)
    }

    async fn recreate(&self) -> anyhow::Result<()> {
        Ok(self.pods.sandboxes().recreate_records().await?)
    }
}

/// The socket of the sandbox controller.
struct SandboxSocket<'a> {
    pods: &'a PodService,
    store: &'a dyn FdStore,
}

#[async_trait(?Send)]
impl Durable for SandboxSocket<'_> {
    fn name(&self) -> &'static str {
        "the sandbox controller's socket"
    }

    fn path(&self) -> Option<&Path> {
        Some(self.pods.socket())
    }

    fn is_single_file(&self) -> bool {
        true
    }

    async fn recreate(&self) -> anyhow::Result<()> {
        self.pods.recreate_listener(self.store)
    }
}

/// What is known of former daemons.
struct History<'a> {
    lives: &'a Lives,
}

#[async_trait(?Send)]
impl Durable for History<'_> {
    fn name(&self) -> &'static str {
        "the history of daemons"
    }

    fn path(&self) -> Option<&Path> {
        Some(self.lives.path())
    }

    fn is_single_file(&self) -> bool {
        true
    }

    async fn recreate(&self) -> anyhow::Result<()> {
        Ok(self.lives.recreate()?)
    }
}

/// The socket on which operators are answered.
struct AdminSocket<'a> {
    admin: &'a Admin,
}

#[async_trait(?Send)]
impl Durable for AdminSocket<'_> {
    fn name(&self) -> &'static str {
        "the admin socket"
    }

    fn path(&self) -> Option<&Path> {
        Some(self.admin.path())
    }

    fn is_single_file(&self) -> bool {
        true
    }

    async fn recreate(&self) -> anyhow::Result<()> {
        Ok(self.admin.recreate()?)
    }
}

/// The lock and the socket of the keeper, which the keeper itself recreates when it is asked to.
struct KeeperFiles<'a> {
    manager: &'a ServiceManager,
}

#[async_trait(?Send)]
impl Durable for KeeperFiles<'_> {
    fn name(&self) -> &'static str {
        "the keeper's files"
    }

    fn path(&self) -> Option<&Path> {
        None
    }

    async fn recreate(&self) -> anyhow::Result<()> {
        Ok(self.manager.request_keeper_files()?)
    }
}

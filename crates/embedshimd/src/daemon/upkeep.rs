//! [`StateDir`]: the daemon's state directory, which can be removed, emptied or mounted over while
//! the daemon runs, by a clean-up of `/run` say. Owns noticing that, and making everything again
//! that only this process still knows: one list, [`Durable`], of all that is durable there.

use std::cell::RefCell;
use std::fs::File;
use std::future::Future;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use embedshim_core::chain;
use embedshim_core::fdstore::{FdName, FdStore};
use embedshim_core::task::Node;
use nix::fcntl::Flock;
use shim_api::events::Outboxes;
use shim_api::server::Server;
use shim_api::services::Services;
use tokio::net::UnixListener;
use tracing::{error, info, warn};

use crate::service_manager::Manager;
use crate::state_dir::lock;

/// How often to look whether everything is where it was.
const LOOK: Duration = Duration::from_secs(2);
/// How long the connections have to write their journals again.
const NOTING: Duration = Duration::from_secs(5);

/// What the daemon has in its state directory.
pub(crate) struct StateDir<'a> {
    pub(crate) path: &'a Path,
    pub(crate) socket: &'a Path,
    pub(crate) server: &'a Server<Services>,
    pub(crate) node: &'a Node,
    pub(crate) outboxes: &'a Outboxes,
    pub(crate) store: &'a dyn FdStore,
    pub(crate) manager: Option<&'a Manager>,
}

/// A thing in the state directory that a successor or a client needs. In the order in which they
/// are made again: a client that finds the socket finds the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Durable {
    Lock,
    Records,
    Journals,
    Events,
    Socket,
}

impl Durable {
    const ALL: [Self; 5] = [
        Self::Lock,
        Self::Records,
        Self::Journals,
        Self::Events,
        Self::Socket,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Lock => "the lock",
            Self::Records => "the task records",
            Self::Journals => "the connections' journals",
            Self::Events => "the events for containerd",
            Self::Socket => "the socket",
        }
    }
}

/// Which file something is, to notice that another one has taken its place.
type FileId = (u64, u64);

fn id(path: &Path) -> Option<FileId> {
    let metadata = path.symlink_metadata().ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// What is made again in the course of the daemon's life.
#[derive(Default)]
struct Made {
    /// The files of former ones are gone, and nothing may take their place.
    locks: Vec<Flock<File>>,
    listener: Option<UnixListener>,
}

impl StateDir<'_> {
    /// Serves until this completes.
    pub(crate) async fn serve<T>(
        &self,
        mut listener: UnixListener,
        end: impl Future<Output = T>,
    ) -> T {
        tokio::pin!(end);
        let made = RefCell::new(Made::default());
        let mut ids = self.ids();
        let mut last_failure = String::new();
        loop {
            let interruption = async {
                tokio::select! {
                    biased;
                    end = &mut end => ControlFlow::Break(end),
                    missing = self.missing(&ids) => ControlFlow::Continue(missing),
                }
            };
            let missing = match self.server.serve(&listener, interruption).await {
                ControlFlow::Break(end) => {
                    self.server.stop();
                    return end;
                }
                ControlFlow::Continue(missing) => missing,
            };
            let names: Vec<&str> = missing.iter().map(|durable| durable.name()).collect();
            if last_failure.is_empty() {
                warn!(state_dir = %self.path.display(), missing = names.join(", "), "state directory: files were removed or replaced");
            }
            match self.recreate(&missing, &made).await {
                Ok(()) => {
                    last_failure.clear();
                    info!(state_dir = %self.path.display(), "state directory: everything was made again; what was removed with a container that has ended is lost");
                }
                Err(failure) => {
                    let failure = chain(failure.as_ref());
                    if failure != last_failure {
                        error!(state_dir = %self.path.display(), error = failure, "state directory: cannot make its files again; trying on");
                    }
                    last_failure = failure;
                }
            }
            if let Some(again) = made.borrow_mut().listener.take() {
                listener = again;
            }
            if last_failure.is_empty() {
                ids = self.ids();
            }
        }
    }

    fn path_of(&self, durable: Durable) -> PathBuf {
        match durable {
            Durable::Lock => lock::of_daemon(self.path),
            Durable::Records => self.path.join("tasks"),
            Durable::Journals => self.path.join("connections"),
            Durable::Events => self.path.join("events"),
            Durable::Socket => self.socket.to_owned(),
        }
    }

    fn ids(&self) -> [Option<FileId>; 5] {
        Durable::ALL.map(|durable| id(&self.path_of(durable)))
    }

    /// Completes when something is not there, or is not what it was.
    async fn missing(&self, ids: &[Option<FileId>; 5]) -> Vec<Durable> {
        loop {
            tokio::time::sleep(LOOK).await;
            let now = self.ids();
            let missing: Vec<Durable> = Durable::ALL
                .into_iter()
                .zip(ids.iter().zip(now))
                .filter(|(_, (before, now))| now.is_none() || **before != *now)
                .map(|(durable, _)| durable)
                .collect();
            if !missing.is_empty() {
                return missing;
            }
        }
    }

    async fn recreate(&self, missing: &[Durable], made: &RefCell<Made>) -> anyhow::Result<()> {
        for durable in Durable::ALL {
            // A directory that is there may have been emptied. The lock and the socket are files.
            let is_whole = matches!(durable, Durable::Lock | Durable::Socket);
            if !is_whole || missing.contains(&durable) {
                self.recreate_one(durable, made)
                    .await
                    .with_context(|| durable.name())?;
            }
        }
        if let Some(manager) = self.manager {
            manager.restore().context("the keeper's files")?;
        }
        Ok(())
    }

    async fn recreate_one(&self, durable: Durable, made: &RefCell<Made>) -> anyhow::Result<()> {
        match durable {
            Durable::Lock => {
                let lock = lock::take(self.path, &lock::of_daemon(self.path))?
                    .context("another daemon has taken it; stop one of the two")?;
                made.borrow_mut().locks.push(lock);
            }
            Durable::Records => self.node.record_again().await?,
            Durable::Journals => match self.server.note_again(NOTING).await {
                Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {
                    warn!(
                        "a connection has not written its journal again: its client does not read"
                    );
                }
                noted => noted?,
            },
            Durable::Events => self.outboxes.recreate()?,
            Durable::Socket => {
                let listener = shim_api::socket::listen(self.socket)?;
                let kept = self
                    .store
                    .forget(&FdName::Listener)
                    .and_then(|()| self.store.keep(&FdName::Listener, &[listener.as_fd()]));
                if let Err(error) = kept {
                    warn!(%error, "the listener is not stored");
                }
                made.borrow_mut().listener = Some(listener);
            }
        }
        Ok(())
    }
}

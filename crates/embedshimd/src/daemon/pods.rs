//! [`PodService`]: the daemon as containerd's sandbox controller, where the configuration says so.
//! Composition: the sandboxes, their gRPC server and its socket, what tasks need to join them.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context;
use embedshim_core::fdstore::{FdName, FdStore, InheritedFds};
use embedshim_core::sandbox::{SandboxConfig, SandboxObserver, Sandboxes};
use embedshim_core::task::Node;
use sandbox_api::{Controller, Server, known_to_containerd};
use shim_api::services::Pods;
use tokio::task::AbortHandle;
use tracing::{info, warn};

use super::listener;
use crate::config;

/// How often it is looked whether containerd has removed the bundle of a running container: its
/// only way to give one up after it lost the container's connection.
const BUNDLES_PERIOD: Duration = Duration::from_secs(10);
/// When containerd is first asked which pods it knows. It waits for their ends again within four
/// seconds of a restart.
const FIRST_COLLECTION: Duration = Duration::from_secs(10);
/// How often it is asked afterwards.
const COLLECTION_PERIOD: Duration = Duration::from_hours(1);
/// The launcher, beside this program.
const LAUNCHER: &str = "containerd-shim-embed-v1";

/// The sandbox controller of this daemon.
pub(super) struct PodService {
    sandboxes: Sandboxes,
    server: Server,
    socket: PathBuf,
    containerd: PathBuf,
    events: String,
    launcher: PathBuf,
    background: OnceLock<Background>,
}

/// Ends with the service.
struct Background([AbortHandle; 2]);

impl Drop for Background {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

impl PodService {
    /// Takes over the sandboxes, and listens in the state directory; the Task service is at
    /// `tasks`.
    pub(super) async fn open(
        config: &config::Sandbox,
        (state_dir, tasks): (&Path, &Path),
        observer: Arc<dyn SandboxObserver>,
        inherited: &mut InheritedFds,
        store: &dyn FdStore,
    ) -> anyhow::Result<Self> {
        let sandbox_config = SandboxConfig {
            state_dir: state_dir.to_owned(),
            cri_root: config.cri_root.clone(),
            cri_state: config.cri_state.clone(),
            unprivileged_ports: config.unprivileged_ports,
            unprivileged_ping: config.unprivileged_ping,
            observer: Some(observer),
        };
        let sandboxes = Sandboxes::open(sandbox_config)
            .await
            .context("cannot take over the sandboxes of this node")?;
        let program = std::env::current_exe().context("cannot find this program's directory")?;
        // As long as that of tasks, so a socket can have it.
        let socket = tasks.with_file_name("pods.sock");
        let controller = Controller::new(sandboxes.clone(), tasks);
        let server = Server::new(controller.of_containerd(&config.containerd));
        // The sandboxes are there before the first call: one that is not known has ended, to
        // containerd.
        server.listen(listener::open(
            &FdName::SandboxListener,
            &socket,
            inherited,
            store,
        )?);
        info!(socket = %socket.display(), "serving as a sandbox controller");
        Ok(Self {
            sandboxes,
            server,
            socket,
            containerd: config.containerd.clone(),
            events: config.events.to_string_lossy().into_owned(),
            launcher: program.with_file_name(LAUNCHER),
            background: OnceLock::new(),
        })
    }

    /// What tasks need to join the sandboxes.
    pub(super) fn of_tasks(&self) -> Pods {
        Pods {
            sandboxes: self.sandboxes.clone(),
            events: self.events.clone(),
            launcher: self.launcher.clone(),
        }
    }

    /// Removes now and then what containerd has given up without a word: containers and pods.
    pub(super) fn clean_up(&self, node: &Node) {
        let node = node.clone();
        let (sandboxes, containerd) = (self.sandboxes.clone(), self.containerd.clone());
        let bundles = async move {
            loop {
                node.clean_up_abandoned().await;
                tokio::time::sleep(BUNDLES_PERIOD).await;
            }
        };
        let pods = async move {
            tokio::time::sleep(FIRST_COLLECTION).await;
            loop {
                collect(&sandboxes, &containerd).await;
                tokio::time::sleep(COLLECTION_PERIOD).await;
            }
        };
        self.background.get_or_init(|| {
            let [bundles, pods] = [tokio::spawn(bundles), tokio::spawn(pods)];
            Background([bundles.abort_handle(), pods.abort_handle()])
        });
    }

    pub(super) fn sandboxes(&self) -> &Sandboxes {
        &self.sandboxes
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// A new listener in the place of one whose path was removed.
    pub(super) fn recreate_listener(&self, store: &dyn FdStore) -> anyhow::Result<()> {
        let listener = listener::recreate(&FdName::SandboxListener, &self.socket, store)?;
        self.server.listen(listener);
        Ok(())
    }

    /// Tells containerd to come back, and waits for what is in flight.
    pub(super) async fn leave(&self) {
        self.server.leave().await;
        self.sandboxes.quiet().await;
    }
}

/// Says that there are pods of a daemon that was a sandbox controller. Blocks on the state
/// directory, which is quick.
pub(super) fn warn_of_left(state_dir: &Path) {
    let records = std::fs::read_dir(state_dir.join("sandboxes"));
    let pods = records.map_or(0, Iterator::count);
    if pods > 0 {
        warn!(
            pods,
            "sandbox.enabled is false, and there are pods of this daemon: containerd can neither \
             stop them nor start their containers"
        );
    }
}

/// Removes the sandboxes that containerd does not know. Each was in its store before it was known
/// here, so one that is known here before the store is read, and is not in it, was given up.
async fn collect(sandboxes: &Sandboxes, containerd: &Path) {
    let mut unattended = sandboxes.unattended();
    unattended.sort();
    for keys in unattended.chunk_by(|one, other| one.namespace == other.namespace) {
        let Some(namespace) = keys.first().map(|key| &key.namespace) else {
            continue;
        };
        let known = match known_to_containerd(containerd, namespace).await {
            Ok(known) => known,
            Err(error) => {
                let containerd = containerd.display();
                warn!(%error, %containerd, "cannot ask containerd which sandboxes it knows");
                return;
            }
        };
        let given_up = keys.iter().filter(|key| !known.contains(key.id.as_str()));
        // Again: containerd may wait for its end by now.
        let unattended = sandboxes.unattended();
        for key in given_up.filter(|key| unattended.contains(key)) {
            warn!(sandbox = %key, "containerd does not know a sandbox: removing it");
            if let Err(error) = sandboxes.remove(key).await {
                warn!(sandbox = %key, %error, "cannot remove a sandbox");
            }
        }
    }
}

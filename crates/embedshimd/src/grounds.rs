//! [`Grounds`]: the daemon's state directory, which somebody may remove under it, by a clean-up of `/run` say. Owns noticing that, and
//! putting everything back that only this process still knows.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use embedshim_core::fdstore::{FdName, FdStore};
use embedshim_core::task::Node;
use nix::fcntl::Flock;
use shim_api::server::Server;
use shim_api::services::Services;
use tokio::net::UnixListener;
use tracing::{error, info, warn};

use crate::{daemon, lock};

/// How often to look whether the socket is still where containerd looks for it.
const LOOK: Duration = Duration::from_secs(2);

/// How long the connections have to write their journals again, before the socket says that all is there.
const NOTING: Duration = Duration::from_millis(200);

/// What the daemon stands on.
pub(crate) struct Grounds<'a> {
    pub(crate) state_dir: &'a Path,
    pub(crate) socket: &'a Path,
    pub(crate) server: &'a Server<Services>,
    pub(crate) node: &'a Node,
    pub(crate) store: &'a dyn FdStore,
}

impl Grounds<'_> {
    /// Serves until the daemon is asked to stop.
    pub(crate) async fn serve(&self, mut listener: UnixListener) {
        let stop = daemon::stop();
        tokio::pin!(stop);
        // The first lock's file is gone with the directory; nobody else may take its place.
        let mut locks = Vec::new();
        loop {
            let is_asked_to_stop = async {
                tokio::select! {
                    () = &mut stop => true,
                    () = self.vanish() => false,
                }
            };
            if self.server.serve(&listener, is_asked_to_stop).await {
                return self.server.stop();
            }
            warn!(state_dir = %self.state_dir.display(), "somebody has removed the state directory, or what is in it");
            match self.restore().await {
                Ok((lock, again)) => {
                    locks.push(lock);
                    listener = again;
                    info!(
                        "everything is back; what was removed with a container that ended meanwhile is lost"
                    );
                }
                Err(failure) => error!("it cannot be put back: {failure:#}"),
            }
        }
    }

    /// Completes when the socket is gone.
    async fn vanish(&self) {
        loop {
            tokio::time::sleep(LOOK).await;
            if self.socket.symlink_metadata().is_err() {
                return;
            }
        }
    }

    async fn restore(&self) -> anyhow::Result<(Flock<File>, UnixListener)> {
        let lock = lock::take(self.state_dir, &lock::of_daemon(self.state_dir))?
            .context("another daemon has taken it; stop one of the two")?;
        self.node.record_again().await.context("the task records")?;
        self.server
            .note_again()
            .context("the connections' journals")?;
        // Each connection does it in its own task.
        tokio::time::sleep(NOTING).await;
        // Last: who finds the socket finds the rest.
        let listener = shim_api::socket::listen(self.socket).context("the socket")?;
        let kept = self
            .store
            .forget(&FdName::Listener)
            .and_then(|()| self.store.keep(&FdName::Listener, &[listener.as_fd()]));
        if let Err(error) = kept {
            warn!(%error, "the listener is not kept");
        }
        Ok((lock, listener))
    }
}

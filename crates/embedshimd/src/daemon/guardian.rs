//! [`Guardian`]: the daemon's side of the pair of daemon and keeper, each of which replaces the
//! other. Owns noticing that the keeper has ended, killing one that does not answer, and preparing
//! to take its place. Where systemd started the daemon there is no guardian.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use embedshim_core::process::Process;
use embedshim_core::task::Node;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tracing::{error, warn};

use crate::cli::Serve;
use crate::keep::Succession;
use crate::service_manager::ServiceManager;
use crate::sys;

/// How long to wait after a failed attempt to become the keeper.
const RETRY: Duration = Duration::from_secs(5);
/// What an operator has to know while there is no keeper.
const ALONE: &str = "every connection of containerd ends with this daemon, and containerd then \
                     destroys its containers; stop containerd before this daemon";

/// Watches the keeper.
#[derive(Debug)]
pub(super) struct Guardian {
    keeper: Keeper,
    manager: Arc<ServiceManager>,
    /// How long the keeper may take to answer; `None`: it is never asked.
    patience: Option<Duration>,
}

#[derive(Debug)]
enum Keeper {
    Watched {
        process: Process,
        ended: AsyncFd<OwnedFd>,
    },
    /// The keeper had ended before it could be watched.
    Ended,
}

impl Keeper {
    /// Begins to watch the keeper with this pid, the parent of this process. `None` if that cannot
    /// be, since the kernel has no pidfds.
    fn watch(pid: i32) -> Option<Self> {
        let process = Process::open(pid);
        // While it is the parent of this process, no other process can have its pid.
        if nix::unistd::getppid().as_raw() != pid {
            return Some(Self::Ended);
        }
        let process = process.ok()?;
        let pidfd = process.pidfd()?.try_clone_to_owned().ok()?;
        let ended = sys::when_readable(pidfd).ok()?;
        Some(Self::Watched { process, ended })
    }

    /// Completes when the keeper has ended.
    async fn ended(&self) {
        if let Self::Watched { ended, .. } = self
            && let Err(error) = ended.readable().await
        {
            error!(%error, "cannot watch the keeper");
            std::future::pending::<()>().await;
        }
    }

    fn pid(&self) -> Option<i32> {
        match self {
            Self::Watched { process, .. } => Some(process.identity().pid),
            Self::Ended => None,
        }
    }

    fn kill(&self) {
        if let Self::Watched { process, .. } = self {
            // Fails only if the keeper has ended already.
            let _ = process.signal(libc::SIGKILL);
        }
    }
}

impl Guardian {
    /// Watches the keeper with this pid, which has started this process. `None` if it cannot be
    /// watched, since the kernel has no pidfds.
    pub(super) fn new(
        keeper: i32,
        manager: Arc<ServiceManager>,
        patience: Option<Duration>,
    ) -> Option<Self> {
        Some(Self {
            keeper: Keeper::watch(keeper)?,
            manager,
            patience,
        })
    }

    /// Completes when the keeper has ended and this process can take its place.
    pub(super) async fn succession(&self, options: &Serve, node: &Node) -> Succession {
        self.end_of_keeper().await;
        let pid = self.keeper.pid();
        if !self.manager.begin_succession() {
            error!(
                pid,
                "the keeper has ended, and its place cannot be taken: too few files may be open \
                 (RLIMIT_NOFILE); {ALONE}"
            );
            return std::future::pending().await;
        }
        warn!(
            pid,
            "the keeper has ended: this process becomes the keeper and starts another embedshimd"
        );
        loop {
            let (options, node) = (options.clone(), node.clone());
            let prepared =
                tokio::task::spawn_blocking(move || Succession::prepare(&options, &node));
            match prepared.await.map_err(anyhow::Error::from).flatten() {
                Ok(succession) => return succession,
                Err(failure) => error!(
                    error = format!("{failure:#}"),
                    again_in = ?RETRY,
                    "cannot become the keeper; {ALONE}"
                ),
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Completes when the keeper has ended, by itself or killed since it did not answer.
    async fn end_of_keeper(&self) {
        let mut ended = pin!(self.keeper.ended());
        let Some(patience) = self.patience else {
            return ended.await;
        };
        loop {
            if unless_ended(tokio::time::sleep(patience / 3), &mut ended)
                .await
                .is_none()
            {
                return;
            }
            let Some(answer) = unless_ended(self.answer(patience), &mut ended).await else {
                return;
            };
            if let Err(error) = answer {
                warn!(
                    pid = self.keeper.pid(),
                    %error,
                    ?patience,
                    "the keeper does not answer: killing it"
                );
                self.keeper.kill();
                return ended.await;
            }
        }
    }

    /// Waits until the keeper has handled everything that was sent to it; fails after `patience`.
    async fn answer(&self, patience: Duration) -> io::Result<()> {
        let pipe = pipe::Receiver::from_file(OwnedFd::from(self.manager.barrier()?).into())?;
        let mut byte = [0];
        let end = async {
            loop {
                pipe.readable().await?;
                match pipe.try_read(&mut byte) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    read => return read.map(drop),
                }
            }
        };
        tokio::time::timeout(patience, end).await?
    }
}

/// The result of this work, or `None` if `end` completes first.
async fn unless_ended<T>(
    work: impl Future<Output = T>,
    end: &mut (impl Future<Output = ()> + Unpin),
) -> Option<T> {
    tokio::select! {
        biased;
        () = end => None,
        result = work => Some(result),
    }
}

/// Says twice in each period that the reactor runs: the service manager's watchdog kills a daemon
/// that does not.
pub(super) async fn notify_alive(manager: Arc<ServiceManager>, period: Duration) {
    let mut interval = tokio::time::interval(period / 2);
    loop {
        interval.tick().await;
        if let Err(error) = manager.notify_alive() {
            warn!(%error, "cannot notify the service manager: WATCHDOG=1 was not delivered");
        }
    }
}

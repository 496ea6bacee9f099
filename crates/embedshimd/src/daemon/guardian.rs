//! [`Guardian`]: the daemon's side of the pair of daemon and keeper, each of which replaces the
//! other. Owns noticing that the keeper has ended, or does not answer and is ended, and preparing
//! to take its place. Where systemd is the keeper there is none.

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
use crate::service_manager::Manager;
use crate::sys;

/// After a failure.
const RETRY: Duration = Duration::from_secs(5);
/// What an operator has to know meanwhile.
const ALONE: &str = "with this daemon ends every connection of containerd, which then destroys its \
                     containers; stop containerd before this daemon";

/// Watches the keeper.
#[derive(Debug)]
pub(crate) struct Guardian {
    keeper: Keeper,
    manager: Arc<Manager>,
    /// How long it may take to answer; without it, that is not asked.
    patience: Option<Duration>,
}

#[derive(Debug)]
enum Keeper {
    Watched {
        process: Process,
        ended: AsyncFd<OwnedFd>,
    },
    /// It had ended before it could be watched.
    Ended,
}

impl Keeper {
    /// `None` if it cannot be watched, since the kernel has no pidfds.
    fn of(pid: i32) -> Option<Self> {
        let process = Process::open(pid);
        // A parent's number is not another's as long as it is our parent.
        if nix::unistd::getppid().as_raw() != pid {
            return Some(Self::Ended);
        }
        let process = process.ok()?;
        let pidfd = process.pidfd()?.try_clone_to_owned().ok()?;
        let ended = sys::when_readable(pidfd).ok()?;
        Some(Self::Watched { process, ended })
    }

    /// Completes when it has ended.
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
            // It fails for one that has ended already.
            let _ = process.signal(libc::SIGKILL);
        }
    }
}

impl Guardian {
    /// Of the keeper with this number, which has started this process. `None` if it cannot be
    /// watched, since the kernel has no pidfds.
    pub(crate) fn of(
        keeper: i32,
        manager: Arc<Manager>,
        patience: Option<Duration>,
    ) -> Option<Self> {
        Some(Self {
            keeper: Keeper::of(keeper)?,
            manager,
            patience,
        })
    }

    /// Completes when the keeper has ended and this process can take its place.
    pub(crate) async fn succession(&self, options: &Serve, node: &Node) -> Succession {
        self.end_of_keeper().await;
        let pid = self.keeper.pid();
        if !self.manager.holds_all() {
            error!(
                pid,
                "the keeper has ended, and too few files may be open to take its place: {ALONE}"
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
                    "cannot become the keeper: {ALONE}"
                ),
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn end_of_keeper(&self) {
        let mut ended = pin!(self.keeper.ended());
        let Some(patience) = self.patience else {
            return ended.await;
        };
        loop {
            if is_first(tokio::time::sleep(patience / 3), &mut ended)
                .await
                .is_none()
            {
                return;
            }
            let Some(answer) = is_first(self.answer(patience), &mut ended).await else {
                return;
            };
            if let Err(error) = answer {
                warn!(pid = self.keeper.pid(), %error, ?patience, "the keeper does not answer: killing it");
                self.keeper.kill();
                return ended.await;
            }
        }
    }

    /// Waits until the keeper has handled everything that was sent to it.
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

/// The result of this work, unless something else comes before.
async fn is_first<T>(
    work: impl Future<Output = T>,
    end: &mut (impl Future<Output = ()> + Unpin),
) -> Option<T> {
    tokio::select! {
        biased;
        () = end => None,
        result = work => Some(result),
    }
}

/// Says in each half of this period that the reactor runs, for the keeper or systemd.
pub(crate) async fn keep_saying(manager: Arc<Manager>, period: Duration) {
    let mut interval = tokio::time::interval(period / 2);
    loop {
        interval.tick().await;
        if let Err(error) = manager.alive() {
            warn!(%error, "cannot say that this daemon is alive");
        }
    }
}

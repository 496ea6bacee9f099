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
use tokio::net::unix::pipe;
use tracing::{debug, error, warn};

use crate::cli::Serve;
use crate::keep::Succession;
use crate::service_manager::ServiceManager;
use crate::sys;

/// How long to wait after a failed attempt to become the keeper.
pub(super) const RETRY: Duration = Duration::from_secs(5);
/// What an operator has to know while there is no keeper.
pub(super) const ALONE: &str = "every connection of containerd ends with this daemon, and containerd then \
                     destroys its containers; stop containerd before this daemon";

/// The keeper that has started this process.
#[derive(Debug)]
pub(super) enum Keeper {
    Watched(Process),
    /// It had ended before it could be watched.
    Ended,
}

impl Keeper {
    /// Begins to watch the keeper with this pid, the parent of this process. `None` if that cannot
    /// be, since the kernel has no pidfds.
    pub(super) fn watch(pid: i32) -> Option<Self> {
        let process = Process::open(pid);
        // While it is the parent of this process, no other process can have its pid.
        if nix::unistd::getppid().as_raw() != pid {
            return Some(Self::Ended);
        }
        let process = process.ok()?;
        process.pidfd()?;
        Some(Self::Watched(process))
    }

    pub(super) fn has_ended(&self) -> bool {
        match self {
            Self::Watched(process) => process.has_ended().unwrap_or(false),
            Self::Ended => true,
        }
    }

    /// Completes when the keeper has ended.
    async fn ended(&self) {
        let Self::Watched(process) = self else { return };
        let end = async {
            let pidfd = process.pidfd().ok_or(io::ErrorKind::Unsupported)?;
            let ended = sys::when_readable(pidfd)?;
            ended.readable().await.map(drop)
        };
        let end: io::Result<()> = end.await;
        if let Err(error) = end {
            error!(%error, "cannot watch the keeper");
            std::future::pending::<()>().await;
        }
    }

    fn pid(&self) -> Option<i32> {
        match self {
            Self::Watched(process) => Some(process.identity().pid),
            Self::Ended => None,
        }
    }

    fn kill(&self) {
        if let Self::Watched(process) = self {
            // Fails only if the keeper has ended already.
            let _ = process.signal(libc::SIGKILL);
        }
    }
}

/// Watches the keeper.
#[derive(Debug)]
pub(super) struct Guardian<'a> {
    keeper: &'a Keeper,
    manager: &'a ServiceManager,
    /// How long the keeper may take to answer; `None`: it is never asked.
    patience: Option<Duration>,
}

impl<'a> Guardian<'a> {
    /// Watches this keeper.
    pub(super) fn new(
        keeper: &'a Keeper,
        manager: &'a ServiceManager,
        patience: Option<Duration>,
    ) -> Self {
        Self {
            keeper,
            manager,
            patience,
        }
    }

    pub(super) fn has_keeper_ended(&self) -> bool {
        self.keeper.has_ended()
    }

    /// Completes when the keeper has ended by itself, and this process can take its place.
    pub(super) async fn early_succession(&self) {
        self.keeper.ended().await;
        self.begin_succession().await;
    }

    /// Completes when the keeper has ended and this process has prepared to take its place.
    pub(super) async fn succession(&self, options: &Serve, node: &Node) -> Succession {
        self.end_of_keeper().await;
        self.begin_succession().await;
        loop {
            let (options, node) = (options.clone(), node.clone());
            let prepared = tokio::task::spawn_blocking(move || {
                Succession::prepare(&options, |command| node.spawn(command))
            });
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

    /// Never completes if this process cannot take the keeper's place.
    async fn begin_succession(&self) {
        let pid = self.keeper.pid();
        if self.manager.begin_succession() {
            warn!(
                pid,
                "the keeper has ended: this process becomes the keeper and starts another \
                 embedshimd"
            );
            return;
        }
        error!(
            pid,
            "the keeper has ended, and its place cannot be taken: too few files may be open \
             (RLIMIT_NOFILE); {ALONE}"
        );
        std::future::pending::<()>().await;
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
/// that does not. What the daemon does is told with it, when it has changed.
pub(super) async fn notify_alive(
    manager: Arc<ServiceManager>,
    period: Duration,
    does: impl Fn() -> String,
) {
    let mut interval = tokio::time::interval(period / 2);
    let mut told = String::new();
    loop {
        interval.tick().await;
        let text = does();
        if text != told {
            if let Err(error) = manager.notify_status(&text) {
                debug!(%error, "cannot notify the service manager: STATUS= was not delivered");
            }
            told = text;
        }
        if let Err(error) = manager.notify_alive() {
            warn!(%error, "cannot notify the service manager: WATCHDOG=1 was not delivered");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;
    use std::sync::atomic::{AtomicU32, Ordering};

    use embedshim_core::fdstore::InheritedFds;

    use super::*;

    #[tokio::test]
    async fn what_the_daemon_does_is_told_when_it_has_changed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let theirs = UnixDatagram::bind(&path).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let inherited = InheritedFds::default();
        let address = path.into_os_string();
        let manager = ServiceManager::connect(&address, None, &inherited, false).unwrap();
        let tasks = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&tasks);
        let does = move || format!("tasks: {}", counted.load(Ordering::Relaxed));
        let period = Duration::from_millis(2);
        tokio::spawn(notify_alive(Arc::new(manager), period, does));
        let mut told = Vec::new();
        let mut buffer = [0; 64];
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        // The second status comes after some signs of life.
        let mut alive = 0;
        while told.len() < 2 && tokio::time::Instant::now() < deadline {
            match theirs.recv(&mut buffer) {
                Ok(length) if &buffer[..length] == b"WATCHDOG=1\n" => alive += 1,
                Ok(length) => told.push(String::from_utf8_lossy(&buffer[..length]).into_owned()),
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
            if alive == 3 {
                tasks.store(1, Ordering::Relaxed);
            }
        }
        assert_eq!(told, ["STATUS=tasks: 0\n", "STATUS=tasks: 1\n"]);
        assert!(alive >= 3, "{alive}");
    }
}

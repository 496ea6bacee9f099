//! [`PidfdMonitor`]: waits for thousands of processes without a task or a thread for each.
//! Owns who is waited for; how an ended process ended is in `status`.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use exit_monitor::BootTime;
use exit_monitor::process::{Process, ProcessIdentity};
use exit_monitor::{Backend, ExitMonitor, ExitRecord, Guarantees, WatchError, Watched};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::io::unix::AsyncFd;
use tracing::debug;

use crate::{probe, status, sys};

/// How many exits are taken from the kernel at once.
const BATCH: usize = 256;
/// How often processes are looked at where the kernel has no pidfds.
const LOOK: Duration = Duration::from_millis(20);

/// Learns of exits by pidfds.
pub struct PidfdMonitor {
    epoll: Epoll,
    /// The same epoll instance, as the async runtime waits for it.
    ready: AsyncFd<File>,
    watches: Mutex<Watches>,
    guarantees: Guarantees,
    /// The kernel has no pidfds: a thread has to look again and again.
    by_looking: bool,
}

#[derive(Default)]
struct Watches {
    last: u64,
    processes: HashMap<u64, Arc<Process>>,
    tokens: HashMap<ProcessIdentity, u64>,
    /// Our children whose end is reported and not confirmed.
    zombies: HashMap<ProcessIdentity, Arc<Process>>,
}

impl fmt::Debug for PidfdMonitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PidfdMonitor")
            .field("watched", &self.watches().tokens.len())
            .finish_non_exhaustive()
    }
}

impl PidfdMonitor {
    /// A monitor that watches nothing yet. Needs a tokio runtime.
    pub fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let ready = sys::register(epoll.0.try_clone()?.into())?;
        Ok(Self {
            epoll,
            ready,
            watches: Mutex::default(),
            guarantees: probe::guarantees(),
            by_looking: !probe::has_pidfds(),
        })
    }

    fn arm(&self, process: &Arc<Process>) -> Result<(), WatchError> {
        let identity = process.identity();
        let mut watches = self.watches();
        if watches.tokens.contains_key(&identity) {
            return Ok(());
        }
        watches.last += 1;
        let token = watches.last;
        if let Some(pidfd) = process.pidfd() {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, token);
            self.epoll
                .add(pidfd, event)
                .map_err(|errno| WatchError::Kernel {
                    call: "epoll_ctl",
                    pid: identity.pid,
                    source: errno.into(),
                })?;
        }
        watches.tokens.insert(identity, token);
        watches.processes.insert(token, Arc::clone(process));
        Ok(())
    }

    /// Ends a watch. Of several that try, one gets the process, and reports its end or does not.
    fn disarm(&self, token: u64) -> Option<Arc<Process>> {
        let mut watches = self.watches();
        let process = watches.processes.remove(&token)?;
        watches.tokens.remove(&process.identity());
        if let Some(pidfd) = process.pidfd() {
            // The descriptor is the process's, still open: the kernel has nothing to complain of.
            let _ = self.epoll.delete(pidfd);
        }
        Some(process)
    }

    fn token(&self, identity: ProcessIdentity) -> Option<u64> {
        self.watches().tokens.get(&identity).copied()
    }

    fn take_ready(&self, into: &mut Vec<ExitRecord>) -> Result<usize, WatchError> {
        let mut events = [EpollEvent::empty(); BATCH];
        let count = loop {
            match self.epoll.wait(&mut events, EpollTimeout::ZERO) {
                Err(Errno::EINTR) => {}
                other => {
                    break other.map_err(|errno| WatchError::Kernel {
                        call: "epoll_wait",
                        pid: 0,
                        source: errno.into(),
                    })?;
                }
            }
        };
        let ended = events
            .iter()
            .take(count)
            .filter_map(|event| self.disarm(event.data()));
        into.extend(ended.map(|process| self.record(&process)));
        Ok(count)
    }

    /// Takes the exits of processes that have no pidfd.
    fn take_by_looking(&self, into: &mut Vec<ExitRecord>) {
        let without: Vec<(u64, Arc<Process>)> = self
            .watches()
            .processes
            .iter()
            .filter(|(_, process)| process.pidfd().is_none())
            .map(|(&token, process)| (token, Arc::clone(process)))
            .collect();
        let ended = without
            .into_iter()
            .filter(|(_, process)| process.has_ended().unwrap_or(false))
            .filter_map(|(token, _)| self.disarm(token));
        into.extend(ended.map(|process| self.record(&process)));
    }

    /// The record of a process that has ended. A child is reaped when it is confirmed, not now:
    /// should we die before anything has written its status down, the zombie still tells our
    /// successor.
    fn record(&self, process: &Arc<Process>) -> ExitRecord {
        let at = BootTime::now();
        let ended = status::of_ended(process);
        let identity = process.identity();
        if ended.is_our_zombie {
            self.watches().zombies.insert(identity, Arc::clone(process));
        }
        ExitRecord {
            process: identity,
            status: ended.status,
            at,
            evidence: ended.evidence,
        }
    }

    fn reap(&self, identity: ProcessIdentity) {
        let zombie = self.watches().zombies.remove(&identity);
        if let Some(Err(error)) = zombie.map(|zombie| status::reap(&zombie)) {
            debug!(pid = identity.pid, %error, "cannot reap a child whose end is known");
        }
    }

    fn watches(&self) -> MutexGuard<'_, Watches> {
        self.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl ExitMonitor for PidfdMonitor {
    fn backend(&self) -> Backend {
        Backend::Pidfd
    }

    fn guarantees(&self) -> Guarantees {
        self.guarantees
    }

    async fn watch(&self, process: Arc<Process>) -> Result<Watched, WatchError> {
        self.arm(&process)?;
        let identity = process.identity();
        let ended = process.has_ended().map_err(|source| WatchError::Kernel {
            call: "poll",
            pid: identity.pid,
            source,
        })?;
        // If it has ended, `next_exits` may have been quicker: then the exit is reported there.
        let taken = ended
            .then(|| self.token(identity).and_then(|token| self.disarm(token)))
            .flatten();
        Ok(taken.map_or(Watched::Armed, |process| {
            Watched::Ended(self.record(&process))
        }))
    }

    async fn next_exits(&self, into: &mut Vec<ExitRecord>) -> Result<(), WatchError> {
        let before = into.len();
        loop {
            if self.by_looking {
                self.take_by_looking(into);
                if into.len() > before {
                    return Ok(());
                }
                tokio::time::sleep(LOOK).await;
                continue;
            }
            let failed = |source| WatchError::Kernel {
                call: "waiting for epoll",
                pid: 0,
                source,
            };
            let mut ready = self.ready.readable().await.map_err(failed)?;
            // No await from here on: an exit is taken from the kernel and given to the caller in
            // one step.
            if self.take_ready(into)? == 0 {
                ready.clear_ready();
            } else if into.len() > before {
                return Ok(());
            }
        }
    }

    async fn confirm(&self, process: ProcessIdentity) -> Result<(), WatchError> {
        self.reap(process);
        Ok(())
    }

    async fn unwatch(&self, process: ProcessIdentity) -> Result<(), WatchError> {
        if let Some(token) = self.token(process) {
            self.disarm(token);
        }
        self.reap(process);
        Ok(())
    }
}

//! Children that nothing here has started: as a subreaper the daemon inherits every orphan below it
//! and must reap it ([`NodeConfig::reap_orphans`](crate::task::NodeConfig::reap_orphans)). Owns the
//! patience that makes this safe; never reaps a process that is watched or may be about to be.
//!
//! `runc exec --detach` leaves its process to us and tells its pid by a file. If that process is
//! over before the file is read, its zombie must still be there, or its status is lost and its
//! number may mean another. So an unknown zombie is reaped only when every runtime call that was
//! under way when it was first seen has claimed its processes.
//!
//! What the daemon starts and waits for by itself (mount helpers, loggers) is started by
//! [`Reaper::spawn`], so that the reaper knows it. Without that, `std` panics if a program cannot
//! be executed and the reaper is quicker.

use std::collections::BTreeSet;
use std::io;
use std::ops::{Deref, DerefMut};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tracing::{debug, warn};

use crate::sys;

/// How long a watched zombie may stand at the head of the queue before we look again.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Which runtime calls are under way.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reaper {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    guards: Mutex<Guards>,
    returned: Notify,
}

#[derive(Debug, Default)]
struct Guards {
    next: u64,
    active: BTreeSet<u64>,
    /// Children that we started and wait for.
    awaited: BTreeSet<i32>,
}

/// While it lives, no orphan that appears is reaped.
#[derive(Debug)]
pub(crate) struct ReapGuard {
    number: u64,
    shared: Arc<Shared>,
}

impl Drop for ReapGuard {
    fn drop(&mut self) {
        self.shared.lock().active.remove(&self.number);
        self.shared.returned.notify_one();
    }
}

/// A child that its starter waits for. While this lives, the reaper leaves it alone; afterwards the
/// reaper takes it.
#[derive(Debug)]
pub struct Awaited {
    child: Child,
    pid: i32,
    shared: Arc<Shared>,
}

impl Deref for Awaited {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.child
    }
}

impl DerefMut for Awaited {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.child
    }
}

impl Awaited {
    /// Its number.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        self.shared.lock().awaited.remove(&self.pid);
        self.shared.returned.notify_one();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Guards> {
        self.guards.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The unknown zombie at the head of the kernel's list, and which calls may still claim it.
#[derive(Clone, Copy, Debug)]
struct Head {
    pid: i32,
    seen_at: u64,
}

/// What a look at the head of the list says to do next.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    WaitForChild,
    LookAgain,
}

impl Reaper {
    /// Takes part: a caller that runs something whose children we inherit holds a guard until their
    /// pids are known.
    pub(crate) fn guard(&self) -> ReapGuard {
        let mut guards = self.shared.lock();
        let number = guards.next;
        guards.next += 1;
        guards.active.insert(number);
        ReapGuard {
            number,
            shared: Arc::clone(&self.shared),
        }
    }

    /// Starts a program whose end the caller waits for, or whose pidfd it takes before it may be
    /// reaped. Blocks.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<Awaited> {
        // Until its number is known.
        let _guard = self.guard();
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        self.shared.lock().awaited.insert(pid);
        Ok(Awaited {
            child,
            pid,
            shared: Arc::clone(&self.shared),
        })
    }

    /// Reaps without end. `watched` tells whether the process of a number is reaped by its monitor.
    pub(crate) async fn reap(self, watched: impl Fn(i32) -> bool) {
        let mut children = match signal(SignalKind::child()) {
            Ok(children) => children,
            Err(source) => {
                warn!(%source, "cannot listen for SIGCHLD: orphans will stay zombies");
                return;
            }
        };
        let mut head = None;
        loop {
            match self.sweep(&mut head, &watched) {
                Next::WaitForChild => wait(&mut children, &self.shared.returned, None).await,
                Next::LookAgain => {
                    wait(&mut children, &self.shared.returned, Some(LOOK_AGAIN)).await;
                }
            }
        }
    }

    /// The kernel shows only the first zombie without reaping it, so one that has another owner
    /// holds up the others; never for long, since its owner reaps it as soon as its pidfd is
    /// readable.
    fn sweep(&self, head: &mut Option<Head>, watched: &impl Fn(i32) -> bool) -> Next {
        loop {
            let Some(pid) = first_zombie() else {
                *head = None;
                return Next::WaitForChild;
            };
            if watched(pid) {
                return Next::LookAgain;
            }
            let guards = self.shared.lock();
            let seen = match *head {
                Some(seen) if seen.pid == pid => seen,
                _ => *head.insert(Head {
                    pid,
                    seen_at: guards.next,
                }),
            };
            let claimable = guards
                .active
                .first()
                .is_some_and(|&oldest| oldest < seen.seen_at);
            let awaited = guards.awaited.contains(&pid);
            drop(guards);
            if claimable || awaited {
                return Next::LookAgain;
            }
            match sys::reap_zombie(pid) {
                Ok(_) => debug!(pid, "reaped an orphan"),
                Err(error) => {
                    debug!(pid, %error, "another part of this process has reaped an orphan");
                }
            }
            *head = None;
        }
    }
}

async fn wait(children: &mut Signal, returned: &Notify, limit: Option<Duration>) {
    let something = async {
        tokio::select! {
            _ = children.recv() => {}
            () = returned.notified() => {}
        }
    };
    match limit {
        None => something.await,
        // Look again on time even if nothing is announced: the head's owner does not tell us.
        Some(limit) => drop(tokio::time::timeout(limit, something).await),
    }
}

/// No child has ended, or there are none.
fn first_zombie() -> Option<i32> {
    loop {
        match sys::peek_zombie() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            found => return found.ok().flatten(),
        }
    }
}

//! [`LookingMonitor`]: an exit monitor whose thread looks at every watched process, again and
//! again.
//!
//! Owns the watches and the thread. It knows the status of children, and of other processes while
//! they are zombies; of one that its parent has reaped before the thread looked, it knows that the
//! process is dead and nothing else. It never knows when a process ended, only when it looked, and
//! what ends while no monitor runs is lost. Without pidfds (before Linux 5.4) it does not reap.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use async_trait::async_trait;
use exit_monitor::process::{Process, ProcessIdentity, parse_stat_field};
use exit_monitor::{
    Backend, BootTime, Evidence, Exactness, ExitMonitor, ExitRecord, ExitStatus, Guarantees,
    Survives, UnknownReason, WatchError, Watched,
};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// How often the thread looks.
const PERIOD: Duration = Duration::from_millis(5);
/// How many exits one call of `next_exits` takes at most.
const BATCH: usize = 256;
/// Fields of `/proc/PID/stat` (proc(5)).
const START_TIME: usize = 22;
const EXIT_CODE: usize = 52;

/// Learns of exits by looking.
#[derive(Debug)]
pub struct LookingMonitor {
    watches: Arc<Watches>,
    exits: tokio::sync::Mutex<UnboundedReceiver<ExitRecord>>,
}

#[derive(Debug)]
struct Watches {
    processes: Mutex<Processes>,
    exits: UnboundedSender<ExitRecord>,
}

#[derive(Debug, Default)]
struct Processes {
    watched: HashMap<ProcessIdentity, Arc<Process>>,
    /// Children whose end is reported and not confirmed.
    zombies: HashMap<ProcessIdentity, Arc<Process>>,
}

impl LookingMonitor {
    /// Starts the thread, which ends when the monitor is dropped.
    pub fn new() -> io::Result<Self> {
        let (sender, exits) = unbounded_channel();
        let watches = Arc::new(Watches {
            processes: Mutex::default(),
            exits: sender,
        });
        let theirs = Arc::downgrade(&watches);
        thread::Builder::new()
            .name("exit monitor".into())
            .spawn(move || look_until_dropped(&theirs))?;
        Ok(Self {
            watches,
            exits: tokio::sync::Mutex::new(exits),
        })
    }
}

fn look_until_dropped(watches: &Weak<Watches>) {
    while let Some(watches) = watches.upgrade() {
        watches.look();
        drop(watches);
        thread::sleep(PERIOD);
    }
}

impl Watches {
    fn processes(&self) -> MutexGuard<'_, Processes> {
        self.processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Reports all that have ended. The caller that takes a process out of the map reports its end.
    fn look(&self) {
        let mut processes = self.processes();
        let has_ended = |process: &Arc<Process>| process.has_ended().unwrap_or(false);
        let ended: Vec<_> = processes
            .watched
            .extract_if(|_, process| has_ended(process))
            .collect();
        for (_, process) in ended {
            // Without a receiver the monitor is about to be dropped.
            let _ = self.exits.send(processes.end(process));
        }
    }
}

impl Processes {
    /// The record of a process that has ended. A child stays a zombie until it is confirmed: should
    /// this program die before, the zombie still has the status.
    fn end(&mut self, process: Arc<Process>) -> ExitRecord {
        let identity = process.identity();
        let known = |status, evidence| ExitRecord {
            process: identity,
            status,
            at: BootTime::now(),
            evidence,
        };
        let of_child = process
            .pidfd()
            .and_then(|pidfd| wait(pidfd, WaitIdOptions::NOWAIT));
        if let Some(status) = of_child {
            self.zombies.insert(identity, process);
            return known(status, Evidence::Wait);
        }
        match of_zombie(&process) {
            Some(status) => known(status, Evidence::Zombie),
            None => ExitRecord::unknown(identity, UnknownReason::NotOurChild),
        }
    }

    fn reap(&mut self, process: ProcessIdentity) {
        let zombie = self.zombies.remove(&process);
        if let Some(pidfd) = zombie.as_ref().and_then(|zombie| zombie.pidfd()) {
            // The status is known already.
            let _ = wait(pidfd, WaitIdOptions::empty());
        }
    }
}

/// The status of a child that has ended; none if it is not a child.
fn wait(pidfd: BorrowedFd<'_>, options: WaitIdOptions) -> Option<ExitStatus> {
    let options = options | WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let ended = waitid(WaitId::PidFd(pidfd), options).ok()??;
    // As waitpid(2) has it.
    let raw = match (ended.exit_status(), ended.terminating_signal()) {
        (Some(code), _) => code << 8,
        (None, Some(signal)) => signal | if ended.dumped() { 0x80 } else { 0 },
        (None, None) => return None,
    };
    Some(ExitStatus::from_wait_status(raw))
}

/// What a zombie shows that is another process's child.
fn of_zombie(process: &Process) -> Option<ExitStatus> {
    let ProcessIdentity {
        pid, start_ticks, ..
    } = process.identity();
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    if parse_stat_field(&stat, START_TIME)? != start_ticks {
        return None;
    }
    let raw = i32::try_from(parse_stat_field(&stat, EXIT_CODE)?).ok()?;
    if raw == 0 {
        // A process without the right to trace it reads 0 there, and may not read this link either.
        fs::read_link(format!("/proc/{pid}/ns/user")).ok()?;
    }
    // The file was read by pid: it was this process's only if that is not reaped even now.
    process.signal(0).ok()?;
    Some(ExitStatus::from_wait_status(raw))
}

#[async_trait]
impl ExitMonitor for LookingMonitor {
    fn backend(&self) -> Backend {
        Backend::Other
    }

    fn guarantees(&self) -> Guarantees {
        Guarantees {
            survives: Survives::Nothing,
            others: Exactness::UntilReaped,
            exact_time: false,
        }
    }

    async fn watch(&self, process: Arc<Process>) -> Result<Watched, WatchError> {
        let identity = process.identity();
        let mut processes = self.watches.processes();
        if processes.watched.contains_key(&identity) {
            return Ok(Watched::Armed);
        }
        let has_ended = process.has_ended().map_err(|source| WatchError::Kernel {
            call: "poll",
            pid: identity.pid,
            source,
        })?;
        if has_ended {
            return Ok(Watched::Ended(processes.end(process)));
        }
        processes.watched.insert(identity, process);
        Ok(Watched::Armed)
    }

    async fn next_exits(&self, into: &mut Vec<ExitRecord>) -> Result<(), WatchError> {
        // Both awaits can be cancelled without losing an exit.
        self.exits.lock().await.recv_many(into, BATCH).await;
        Ok(())
    }

    async fn confirm(&self, process: ProcessIdentity) -> Result<(), WatchError> {
        self.watches.processes().reap(process);
        Ok(())
    }

    async fn unwatch(&self, process: ProcessIdentity) -> Result<(), WatchError> {
        let mut processes = self.watches.processes();
        processes.watched.remove(&process);
        processes.reap(process);
        Ok(())
    }
}

//! [`Zombies`]: children that we inherit as a subreaper when a daemon ends. Owns when they are reaped: when the daemon says so, and not before
//! one that serves has had time to read the status of each, which only a zombie tells (`/proc/PID/stat`).

use std::path::Path;
use std::time::{Duration, Instant};

use embedshim_core::process::parse_stat_field;
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

/// The field of `/proc/PID/stat` (proc(5)).
const START_TIME: usize = 22;
/// How long one stays of which nobody says that it may go.
const PATIENCE: Duration = Duration::from_secs(2);

/// Those that were seen, and when they can go.
#[derive(Debug, Default)]
pub(super) struct Zombies {
    seen: Vec<Pid>,
    due: Option<Instant>,
}

impl Zombies {
    /// When to look again; never, if there are none.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Nobody reads their status now.
    pub(super) fn leave_alone(&mut self) {
        *self = Self::default();
    }

    /// A child has ended, perhaps. Those that come while others are waited for have their turn afterwards.
    pub(super) fn look(&mut self, now: Instant, daemon: Option<Pid>) {
        if self.due.is_none() {
            self.seen = zombies(daemon);
            self.due = (!self.seen.is_empty()).then(|| now + PATIENCE);
        }
    }

    /// Reaps one whose status is written down, if it is a zombie of ours. Others wait on.
    pub(super) fn reap_one(&mut self, pid: i32, start_ticks: u64) {
        let stat = std::fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
        if parse_stat_field(&stat, START_TIME) != Some(start_ticks) {
            return;
        }
        if let Some(pid) = Pid::from_raw(pid) {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            // Who is somebody else's child, or alive, is left alone by the kernel.
            let _ = waitid(WaitId::Pid(pid), options);
            self.seen.retain(|&seen| seen != pid);
        }
    }

    /// Reaps those that have waited long enough.
    pub(super) fn reap(&mut self, now: Instant, daemon: Option<Pid>) {
        if self.due.is_some_and(|due| due <= now) {
            for pid in self.seen.drain(..) {
                let _ = waitid(
                    WaitId::Pid(pid),
                    WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
                );
            }
            self.due = None;
            self.look(now, daemon);
        }
    }
}

fn zombies(daemon: Option<Pid>) -> Vec<Pid> {
    let mut found = children();
    found.retain(|&pid| Some(pid) != daemon && is_zombie(pid));
    found.shrink_to_fit();
    found
}

fn is_zombie(pid: Pid) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    matches!(waitid(WaitId::Pid(pid), options), Ok(Some(_)))
}

/// Our children; without `CONFIG_PROC_CHILDREN` all processes, of which the kernel tells us what are ours.
fn children() -> Vec<Pid> {
    let own = std::process::id();
    let pids = |text: &str| text.parse().ok().and_then(Pid::from_raw);
    if let Ok(list) = std::fs::read_to_string(format!("/proc/self/task/{own}/children")) {
        return list.split_whitespace().filter_map(pids).collect();
    }
    let entries = std::fs::read_dir(Path::new("/proc")).into_iter().flatten();
    entries
        .filter_map(|entry| pids(entry.ok()?.file_name().to_str()?))
        .collect()
}

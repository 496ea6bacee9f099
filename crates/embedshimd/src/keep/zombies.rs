//! [`Zombies`]: children that the keeper inherits as a subreaper when a daemon ends. Owns when they
//! are reaped: when the daemon says so, and not before a daemon that serves has had time to read
//! the status of each, which only a zombie shows (`/proc/PID/stat`). The status of one that was
//! reaped before the daemon said so is remembered, for a daemon that asks late: it was busy, or
//! waits for the runtime that has started the process.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use embedshim_core::process::parse_stat_field;
use rustix::process::{Pid, WaitId, WaitIdOptions, WaitIdStatus, waitid};

/// The number of the field of `/proc/PID/stat` (proc(5)).
const START_TIME: usize = 22;
/// How long a zombie stays that the daemon does not ask to reap.
const PATIENCE: Duration = Duration::from_secs(2);
/// The most statuses that are remembered, of 16 bytes each; the oldest are dropped first.
const MAX_REAPED: usize = 1024;
/// The most statuses of one pid that are answered: a pipe takes them in one write.
const MAX_ANSWER: usize = 64;

/// The zombies that were seen, when they are reaped, and the statuses of those that were.
#[derive(Debug, Default)]
pub(super) struct Zombies {
    seen: Vec<Pid>,
    due: Option<Instant>,
    reaped: VecDeque<Reaped>,
}

/// How a process has ended that was reaped before the daemon had asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reaped {
    pub(super) start_ticks: u64,
    pub(super) pid: i32,
    /// As `waitpid(2)` gives it.
    pub(super) status: i32,
}

impl Zombies {
    /// Takes over the statuses that a former keeper has remembered, the latest first.
    pub(super) fn with(reaped: impl IntoIterator<Item = Reaped>) -> Self {
        Self {
            reaped: reaped.into_iter().take(MAX_REAPED).collect(),
            ..Self::default()
        }
    }

    /// All statuses that are remembered, the latest first.
    pub(super) fn all_reaped(&self) -> impl Iterator<Item = Reaped> {
        self.reaped.iter().copied()
    }

    /// When the seen zombies are reaped; `None` if there are none.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Reaps none until further notice: no daemon runs that could read their status.
    pub(super) fn leave_alone(&mut self) {
        self.seen.clear();
        self.due = None;
    }

    /// Looks for zombies, since a child may have ended. Those that end while others are due are
    /// found afterwards.
    pub(super) fn look(&mut self, now: Instant, daemon: Option<Pid>) {
        if self.due.is_none() {
            self.seen = zombies(daemon);
            self.due = (!self.seen.is_empty()).then(|| now + PATIENCE);
        }
    }

    /// Reaps the zombie with this pid and start time, whose status the daemon has written down. The
    /// others stay.
    pub(super) fn reap_one(&mut self, pid: i32, start_ticks: u64) {
        let stat = std::fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
        if parse_stat_field(&stat, START_TIME) != Some(start_ticks) {
            return;
        }
        if let Some(pid) = Pid::from_raw(pid) {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            // The kernel reaps neither a process that is alive nor the child of another one.
            let _ = waitid(WaitId::Pid(pid), options);
            self.seen.retain(|&seen| seen != pid);
        }
    }

    /// Reaps the zombies that are due.
    pub(super) fn reap(&mut self, now: Instant, daemon: Option<Pid>) {
        if self.due.is_some_and(|due| due <= now) {
            for pid in std::mem::take(&mut self.seen) {
                self.reap_and_remember(pid);
            }
            self.due = None;
            self.look(now, daemon);
        }
    }

    fn reap_and_remember(&mut self, pid: Pid) {
        let number = pid.as_raw_nonzero().get();
        let stat = std::fs::read(format!("/proc/{number}/stat")).unwrap_or_default();
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let ended = waitid(WaitId::Pid(pid), options).ok().flatten();
        let known = ended.and_then(|ended| {
            Some(Reaped {
                start_ticks: parse_stat_field(&stat, START_TIME)?,
                pid: number,
                status: wait_status(&ended)?,
            })
        });
        self.reaped.truncate(MAX_REAPED - 1);
        if let Some(known) = known {
            self.reaped.push_front(known);
        }
    }

    /// How the reaped processes with this pid have ended, the latest first: a line with start time
    /// and wait status for each.
    pub(super) fn reaped(&self, pid: i32) -> String {
        let mut text = String::new();
        for known in self
            .reaped
            .iter()
            .filter(|known| known.pid == pid)
            .take(MAX_ANSWER)
        {
            // Writing into a string cannot fail.
            let _ = writeln!(text, "{} {}", known.start_ticks, known.status);
        }
        text
    }
}

fn wait_status(ended: &WaitIdStatus) -> Option<i32> {
    const CORE_DUMPED: i32 = 0x80;
    if let Some(code) = ended.exit_status() {
        return Some((code & 0xff) << 8);
    }
    let core = if ended.dumped() { CORE_DUMPED } else { 0 };
    ended.terminating_signal().map(|signal| signal | core)
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

/// The children of this process. Without `CONFIG_PROC_CHILDREN` all processes: `waitid` then fails
/// for those that are no children.
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

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn pid(child: &Child) -> Pid {
        Pid::from_child(child)
    }

    fn ended(script: &str) -> Child {
        let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        while !is_zombie(pid(&child)) {
            std::thread::yield_now();
        }
        child
    }

    #[test]
    fn how_a_reaped_zombie_ended_is_known_by_its_start() {
        let mut zombies = Zombies::default();
        let children = [ended("exit 7"), ended("kill -9 $$")];
        let starts = children.each_ref().map(|child| {
            let stat = std::fs::read(format!("/proc/{}/stat", child.id())).unwrap();
            parse_stat_field(&stat, START_TIME).unwrap()
        });
        for child in &children {
            zombies.reap_and_remember(pid(child));
        }
        for (child, (start, status)) in children.iter().zip(starts.iter().zip([7 << 8, 9])) {
            let known = zombies.reaped(pid(child).as_raw_nonzero().get());
            assert_eq!(known, format!("{start} {status}\n"));
        }
        zombies.leave_alone();
        assert_eq!(zombies.reaped.len(), 2);
        assert_eq!(zombies.reaped(1), "");
    }

    #[test]
    fn the_oldest_statuses_go_first() {
        let mut zombies = Zombies::default();
        for status in 0..3000 {
            let (start_ticks, pid) = (1, 1);
            zombies.reaped.push_back(Reaped {
                start_ticks,
                pid,
                status,
            });
        }
        zombies.reap_and_remember(pid(&ended("exit 7")));
        assert_eq!(zombies.reaped.len(), MAX_REAPED);
        assert_eq!(zombies.reaped[0].status, 7 << 8);
        assert_eq!(zombies.reaped(1).lines().count(), MAX_ANSWER);
    }
}

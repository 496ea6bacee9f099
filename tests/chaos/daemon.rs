//! [`Daemons`]: which process serves a state directory now, and which is its keeper. Found by their
//! command lines, so that nothing has to be asked of those that are about to be killed.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::bail;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The keeper waits longer and longer before it starts a daemon that does not live.
const PATIENCE: Duration = Duration::from_secs(45);

/// Which processes serve a state directory.
#[derive(Debug)]
pub(crate) struct Daemons {
    state_dir: PathBuf,
}

/// A process that may be stopped or killed, not only its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Victim {
    pub(crate) pid: i32,
    started: u64,
}

impl Victim {
    /// The process that has this number now.
    pub(crate) fn at(pid: i32) -> Option<Self> {
        let started = started(pid)?;
        Some(Self { pid, started })
    }

    /// Sends it a signal; false if it has gone.
    pub(crate) fn signal(self, signal: Signal) -> bool {
        started(self.pid) == Some(self.started) && kill(Pid::from_raw(self.pid), signal).is_ok()
    }

    pub(crate) fn is_alive(self) -> bool {
        started(self.pid) == Some(self.started) && testbed::sandbox::is_alive(self.pid)
    }
}

impl Daemons {
    pub(crate) fn of(state_dir: &Path) -> Self {
        Self {
            state_dir: state_dir.into(),
        }
    }

    /// The daemon, if one is there.
    pub(crate) fn current(&self) -> Option<Victim> {
        self.find("serve")
    }

    /// Its keeper, if it has one.
    pub(crate) fn keeper(&self) -> Option<Victim> {
        self.find("keep")
    }

    /// The oldest process with this command that has executed its program itself: a child that has
    /// not become runc yet has its parent's command line, also after its parent has died.
    fn find(&self, command: &str) -> Option<Victim> {
        let needle = self.state_dir.to_string_lossy();
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter_map(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).into_owned();
            let mut words = line.split('\0');
            let is_ours = words.next()?.ends_with("embedshimd")
                && words.next() == Some(command)
                && words.any(|word| word == needle);
            if !is_ours || is_on_its_way(pid)? {
                return None;
            }
            Victim::at(pid)
        })
        .min_by_key(|daemon| (daemon.started, daemon.pid))
    }

    /// Waits for a daemon that is not `last`, and returns it.
    pub(crate) fn successor(&self, last: Option<Victim>) -> anyhow::Result<Victim> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(daemon) = self.current().filter(|&daemon| Some(daemon) != last) {
                return Ok(daemon);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        bail!("no daemon for {} s", PATIENCE.as_secs())
    }

    /// Waits until this daemon is the keeper, and has started another.
    pub(crate) fn succession(&self, of: Victim) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.keeper().is_none_or(|keeper| keeper.pid != of.pid) {
            if Instant::now() > deadline {
                bail!("no keeper for {} s", PATIENCE.as_secs());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.successor(Some(of)).map(drop)
    }

    /// Has a keeper that waits before it starts another daemon wait no longer.
    pub(crate) fn hurry(&self) {
        if self.current().is_none()
            && let Some(keeper) = self.keeper()
        {
            keeper.signal(Signal::SIGHUP);
        }
    }

    /// Kills keeper and daemon, which is stopped first: it would take the keeper's place.
    pub(crate) fn kill_both(&self) -> anyhow::Result<()> {
        if let Some(daemon) = self.current() {
            daemon.signal(Signal::SIGSTOP);
        }
        for process in [self.keeper(), self.current()].into_iter().flatten() {
            process.signal(Signal::SIGKILL);
            testbed::sandbox::until("it is gone", || Ok(!process.is_alive()))?;
        }
        Ok(())
    }
}

fn started(pid: i32) -> Option<u64> {
    stat_field(pid, 22)
}

/// Whether a process was forked and has executed no program yet.
fn is_on_its_way(pid: i32) -> Option<bool> {
    /// Of linux/sched.h.
    const PF_FORKNOEXEC: u64 = 0x40;
    Some(stat_field(pid, 9)? & PF_FORKNOEXEC != 0)
}

fn stat_field(pid: i32, number: usize) -> Option<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    embedshim_core::process::parse_stat_field(&stat, number)
}

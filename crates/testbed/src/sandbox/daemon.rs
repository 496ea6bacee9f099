//! The sandbox's `embedshimd`: its keeper and its daemon, who they are, and how they are started
//! and ended.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Running, Sandbox, is_alive, until};

impl Sandbox {
    /// The daemon's log, which is the keeper's too.
    pub fn daemon_log(&self) -> String {
        fs::read_to_string(self.state_dir().join("embedshimd.log")).unwrap_or_default()
    }

    /// The daemon's pid, if it is there. It serves a moment later.
    pub fn daemon_pid(&self) -> Option<i32> {
        self.owner("lock")
    }

    /// The keeper's pid, if it is there.
    pub fn keeper_pid(&self) -> Option<i32> {
        self.owner("keeper.lock")
    }

    fn owner(&self, lock: &str) -> Option<i32> {
        let text = fs::read_to_string(self.state_dir().join(lock)).ok()?;
        let pid = text.lines().next()?.parse().ok()?;
        is_alive(pid).then_some(pid)
    }

    /// The daemon that the keeper has heard to serve.
    fn ready_daemon(&self) -> Option<i32> {
        self.keeper_pid()?;
        let text = fs::read_to_string(self.state_dir().join("keeper.lock")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("daemon "));
        let pid = line?.parse().ok()?;
        (self.daemon_pid() == Some(pid)).then_some(pid)
    }

    /// Ends the daemon with this signal, and the keeper by SIGKILL. The keeper is stopped
    /// meanwhile: it would start the next daemon, and a daemon that outlived it would take its
    /// place.
    pub fn end_daemon(&self, signal: Signal) -> anyhow::Result<()> {
        if let Some(keeper) = self.keeper_pid() {
            stop(Pid::from_raw(keeper)).context("cannot stop the keeper")?;
        }
        end("embedshimd", self.daemon_pid(), signal)?;
        self.end_keeper()
    }

    /// Kills the keeper alone.
    pub fn end_keeper(&self) -> anyhow::Result<()> {
        end("the keeper", self.keeper_pid(), Signal::SIGKILL)
    }

    /// Kills the daemon alone, waits until the keeper has started the next one and that one serves,
    /// and returns its pid.
    pub fn kill_daemon(&self) -> anyhow::Result<i32> {
        self.replace_daemon(Signal::SIGKILL)
    }

    /// Sends the daemon alone a signal that ends it; the rest is the same.
    pub fn replace_daemon(&self, signal: Signal) -> anyhow::Result<i32> {
        let old = self.daemon_pid().context("the daemon is not there")?;
        kill(Pid::from_raw(old), signal).context("cannot signal embedshimd")?;
        self.successor_of(old)
    }

    /// Waits until another daemon than this one serves.
    pub fn successor_of(&self, old: i32) -> anyhow::Result<i32> {
        let mut next = None;
        until("the next embedshimd serves", || {
            next = self.ready_daemon().filter(|&pid| pid != old);
            Ok(next.is_some())
        })
        .with_context(|| self.daemon_log())?;
        next.context("no daemon")
    }

    /// Starts keeper and daemon by hand, as the launcher would, and waits until the daemon serves.
    pub fn start_daemon(&self) -> anyhow::Result<()> {
        self.start_daemon_of(&self.binaries.join("embedshimd"))
    }

    /// The same with another file.
    pub fn start_daemon_of(&self, program: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(self.state_dir())?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.state_dir().join("embedshimd.log"))?;
        let mut command = Command::new(program);
        command
            .args(["keep", "--detached", "--state-dir"])
            .arg(self.state_dir())
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        Running::spawn(&mut command)?.leave();
        until("embedshimd serves", || Ok(self.ready_daemon().is_some()))
            .with_context(|| self.daemon_log())
    }
}

/// Stops a process, and waits until each of its threads has stopped: the signal takes its time.
pub fn stop(process: Pid) -> anyhow::Result<()> {
    kill(process, Signal::SIGSTOP)?;
    until("it has stopped", || Ok(has_stopped(process.as_raw())))
}

/// Whether no thread of a process runs.
fn has_stopped(pid: i32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    threads.into_iter().flatten().flatten().all(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        let state = stat.rsplit(')').next().and_then(|rest| rest.chars().nth(1));
        matches!(state, None | Some('T' | 'Z' | 'X'))
    })
}

fn end(what: &str, pid: Option<i32>, signal: Signal) -> anyhow::Result<()> {
    let Some(pid) = pid else {
        return Ok(());
    };
    match kill(Pid::from_raw(pid), signal) {
        // It has ended by itself.
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(errno) => return Err(errno).with_context(|| format!("cannot signal {what}")),
    }
    until(&format!("{what} ends"), || Ok(!is_alive(pid)))
}

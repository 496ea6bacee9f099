//! `embedshimd upgrade`: asks the keeper to become the binary that is on disk now, and waits until
//! a new daemon serves. Replaces nothing itself.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cli::Upgrade;
use crate::outcome::{Code, Failure, print};
use crate::state_dir::lock::{self, Owner};

/// How long to wait for a new daemon: longer than the keeper waits for the old one to leave.
const LIMIT: Duration = Duration::from_secs(45);
/// How long to wait before the lock files are read again.
const PAUSE: Duration = Duration::from_millis(20);

/// Upgrades keeper and daemon, and prints what they were and are.
pub(crate) fn run(options: &Upgrade) -> Result<Code, Failure> {
    let state_dir = &options.state_dir;
    let Some(keeper) = lock::read_owner(&lock::keeper_path(state_dir))? else {
        return Err(without_keeper(state_dir)?.into());
    };
    let before = lock::read_owner(&lock::daemon_path(state_dir))?;
    kill(Pid::from_raw(keeper.pid), Signal::SIGUSR2)
        .with_context(|| format!("cannot signal the keeper (pid {})", keeper.pid))?;
    let (keeper, daemon) = wait(state_dir, &keeper, before.as_ref())?;
    let shown = |owner: &Owner| format!("{} (pid {})", owner.version, owner.pid);
    let text = format!(
        "embedshimd {} is replaced by {}; its keeper is {}",
        before
            .as_ref()
            .map_or_else(|| "that was down".into(), shown),
        shown(&daemon),
        shown(&keeper)
    );
    print(&text)?;
    Ok(Code::Ok)
}

/// Waits until another daemon than the old one serves, and returns its keeper and it.
fn wait(
    state_dir: &Path,
    old: &Owner,
    old_daemon: Option<&Owner>,
) -> anyhow::Result<(Owner, Owner)> {
    let deadline = Instant::now() + LIMIT;
    let log = state_dir.join("embedshimd.log");
    loop {
        let keeper = lock::read_owner(&lock::keeper_path(state_dir))?.with_context(|| {
            format!("the keeper has ended; its log says why: {}", log.display())
        })?;
        if let (Some(refused), earlier) = (line(&keeper, "refused"), line(old, "refused"))
            && Some(refused) != earlier
        {
            let why = refused.split_once(' ').map_or(refused, |(_, why)| why);
            bail!("the keeper goes on as it was: {why}");
        }
        let ready = line(&keeper, "daemon").and_then(|pid| pid.parse().ok());
        if ready.is_some()
            && ready != old_daemon.map(|daemon| daemon.pid)
            && let Some(daemon) = lock::read_owner(&lock::daemon_path(state_dir))?
            && Some(daemon.pid) == ready
        {
            return Ok((keeper, daemon));
        }
        if Instant::now() > deadline {
            bail!(
                "no new daemon serves after {} s; see {}. The keeper keeps trying, and holds all \
                 connections in the meantime",
                LIMIT.as_secs(),
                log.display()
            );
        }
        std::thread::sleep(PAUSE);
    }
}

/// The rest of the line that begins with this word, in a lock file.
fn line<'a>(owner: &'a Owner, key: &str) -> Option<&'a str> {
    owner
        .more
        .iter()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))
}

/// The message for a state directory without a keeper: what to do instead.
fn without_keeper(state_dir: &Path) -> anyhow::Result<anyhow::Error> {
    let directory = state_dir.display();
    let Some(daemon) = lock::read_owner(&lock::daemon_path(state_dir))? else {
        return Ok(anyhow::anyhow!(
            "nothing runs on {directory}: the next start uses the binary on disk anyway"
        ));
    };
    let pid = daemon.pid;
    Ok(match systemd_unit(pid) {
        Some(unit) => anyhow::anyhow!(
            "systemd restarts this daemon (pid {pid}); run: \
             systemctl kill --kill-whom=main --signal=SIGHUP {unit}"
        ),
        None => anyhow::anyhow!(
            "no keeper holds the connections of this daemon (pid {pid}): \
             stop containerd, stop the daemon, and start containerd again"
        ),
    })
}

/// The systemd unit of the daemon with this pid, if systemd has started it.
fn systemd_unit(pid: i32) -> Option<String> {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    let is_managed = environment
        .split(|&byte| byte == 0)
        .any(|variable| variable.starts_with(b"NOTIFY_SOCKET=/run/systemd/"));
    let cgroups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let unit = cgroups
        .lines()
        .filter_map(|line| line.rsplit('/').next())
        .find(|unit| unit.ends_with(".service"))?;
    is_managed.then(|| unit.to_owned())
}

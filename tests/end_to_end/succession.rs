//! A keeper that is killed while the next daemon starts: that one has every descriptor from its
//! first instruction, and takes the keeper's place whatever becomes of its start.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread::scope;

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Shim, Stage, Test};
use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use testbed::sandbox::{Sandbox, is_alive, stop, until};

use crate::guardians::{becomes_keeper, end, started_after};
use crate::half_done::SlowRuntime;
use crate::operators::ask;
use crate::tests;

pub(crate) const TESTS: [Test; 7] = tests!(WithoutContainerd:
    a_keeper_that_is_killed_while_a_daemon_takes_over_is_replaced,
    a_daemon_that_cannot_start_takes_the_place_of_a_killed_keeper,
    a_daemon_whose_directory_is_locked_takes_the_place_of_a_killed_keeper,
    a_stopped_daemon_takes_the_place_of_a_killed_keeper,
    a_daemon_that_stands_still_while_it_starts_is_replaced,
    a_daemon_that_is_to_end_does_not_become_the_keeper,
    a_daemon_that_makes_way_takes_the_place_of_a_killed_keeper,
);

/// A fifo in the place of a file that a daemon reads while it starts.
struct Gate(File);

impl Gate {
    /// Makes it, lets `replace` start the next daemon, and waits until that one is at the gate.
    fn before(path: &Path, replace: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Self> {
        mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        replace()?;
        let mut file = None;
        until("it is read", || {
            let mut options = File::options();
            // Without a reader this fails.
            let options = options.write(true).custom_flags(OFlag::O_NONBLOCK.bits());
            file = options.open(path).ok();
            Ok(file.is_some())
        })?;
        Ok(Self(file.context("the fifo has no reader")?))
    }

    /// The daemon at the gate reads this.
    fn open(mut self, text: &str) -> anyhow::Result<()> {
        Ok(self.0.write_all(text.as_bytes())?)
    }
}

/// A container, and daemons that read this configuration file.
fn configured(stage: &Stage, config: &Path) -> anyhow::Result<(Sandbox, Shim, u32)> {
    configured_with(stage.bare_sandbox()?, config)
}

fn configured_with(mut sandbox: Sandbox, config: &Path) -> anyhow::Result<(Sandbox, Shim, u32)> {
    fs::write(config, "")?;
    sandbox.set_environment("EMBEDSHIM_CONFIG", &config.to_string_lossy());
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let pid = shim.create("c", bundle.path())?;
    shim.start("c")?;
    Ok((sandbox, shim, pid))
}

/// Kills the daemon, holds the next one at the gate, and kills its keeper then.
fn kill_both_at(sandbox: &Sandbox, path: &Path) -> anyhow::Result<(Gate, i32)> {
    let keeper = sandbox.keeper_pid().context("no keeper")?;
    let daemon = sandbox.daemon_pid().context("no daemon")?;
    let gate = Gate::before(path, || Ok(kill(Pid::from_raw(daemon), Signal::SIGKILL)?))?;
    let next = started_after(daemon, keeper)?;
    sandbox.end_keeper()?;
    Ok((gate, next))
}

/// It does not have to be ready: it has everything from its first instruction.
fn a_keeper_that_is_killed_while_a_daemon_takes_over_is_replaced(
    stage: &Stage,
) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let (sandbox, shim, pid) = configured(stage, &directory.path().join("config.toml"))?;
    let record = sandbox.state_dir().join("tasks/none:none.json");
    let (gate, next) = kill_both_at(&sandbox, &record)?;
    becomes_keeper(&sandbox, next)?;
    fs::remove_file(&record)?;
    gate.open("")?;
    sandbox.successor_of(next)?;
    ensure!(shim.state("c")?.pid == pid, "another task");
    end(&shim)
}

fn a_daemon_that_cannot_start_takes_the_place_of_a_killed_keeper(
    stage: &Stage,
) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("config.toml");
    let (sandbox, shim, pid) = configured(stage, &config)?;
    fs::remove_file(&config)?;
    let (gate, next) = kill_both_at(&sandbox, &config)?;
    fs::remove_file(&config)?;
    fs::write(&config, "")?;
    gate.open("nonsense")?;
    becomes_keeper(&sandbox, next)?;
    sandbox.successor_of(next)?;
    ensure!(shim.state("c")?.pid == pid, "another task");
    end(&shim)
}

/// A child of its predecessor that is not the runtime yet has the lock (invariant 18).
fn a_daemon_whose_directory_is_locked_takes_the_place_of_a_killed_keeper(
    stage: &Stage,
) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("config.toml");
    let (sandbox, shim, pid) = configured(stage, &config)?;
    fs::remove_file(&config)?;
    let (gate, next) = kill_both_at(&sandbox, &config)?;
    let file = File::open(sandbox.state_dir().join("lock"))?;
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock);
    let lock = lock.map_err(|(_, errno)| errno)?;
    fs::remove_file(&config)?;
    fs::write(&config, "")?;
    gate.open("")?;
    becomes_keeper(&sandbox, next)?;
    drop(lock);
    sandbox.successor_of(next)?;
    ensure!(shim.state("c")?.pid == pid, "another task");
    end(&shim)
}

/// The kernel lets it go on then, with SIGHUP: to a process that is stopped and loses its session's
/// last other process.
fn a_stopped_daemon_takes_the_place_of_a_killed_keeper(stage: &Stage) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("config.toml");
    let (sandbox, shim, pid) = configured(stage, &config)?;
    let daemon = sandbox.daemon_pid().context("no daemon")?;
    stop(Pid::from_raw(daemon))?;
    sandbox.end_keeper()?;
    becomes_keeper(&sandbox, daemon)?;
    let next = sandbox.successor_of(daemon)?;
    ensure!(shim.state("c")?.pid == pid, "another task");
    // One that starts has it as well.
    fs::remove_file(&config)?;
    let gate = Gate::before(&config, || Ok(kill(Pid::from_raw(next), Signal::SIGKILL)?))?;
    let young = started_after(next, daemon)?;
    stop(Pid::from_raw(young))?;
    sandbox.end_keeper()?;
    fs::remove_file(&config)?;
    fs::write(&config, "")?;
    gate.open("")?;
    becomes_keeper(&sandbox, young)?;
    sandbox.successor_of(young)?;
    ensure!(shim.state("c")?.pid == pid, "another task");
    end(&shim)
}

/// The keeper waits ten times as long as for one that serves, unless it says that it goes on.
fn a_daemon_that_stands_still_while_it_starts_is_replaced(stage: &Stage) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("config.toml");
    let mut sandbox = stage.bare_sandbox()?;
    sandbox.set_environment("EMBEDSHIM_WATCHDOG", "1");
    let (sandbox, shim, pid) = configured_with(sandbox, &config)?;
    fs::remove_file(&config)?;
    let keeper = sandbox.keeper_pid().context("no keeper")?;
    let daemon = sandbox.daemon_pid().context("no daemon")?;
    let _gate = Gate::before(&config, || {
        Ok(kill(Pid::from_raw(daemon), Signal::SIGKILL)?)
    })?;
    fs::remove_file(&config)?;
    fs::write(&config, "")?;
    sandbox.successor_of(daemon)?;
    let log = sandbox.daemon_log();
    ensure!(log.contains("does not answer the watchdog"), "{log}");
    ensure!(sandbox.keeper_pid() == Some(keeper), "another keeper");
    ensure!(shim.state("c")?.pid == pid, "another task");
    end(&shim)
}

/// Lets a daemon leave for this reason while the runtime is in a call, which ends then.
fn leaves_within_a_call(
    sandbox: &Sandbox,
    shim: &Shim,
    leaves: impl FnOnce(i32) -> anyhow::Result<()>,
) -> anyhow::Result<i32> {
    let runtime = SlowRuntime::new(sandbox, "create", true)?;
    let bundle = Bundle::new(sandbox, "slow", &["true"])?;
    let daemon = sandbox.daemon_pid().context("no daemon")?;
    scope(|scope| {
        // Without an answer if its connection ends with the daemon.
        scope.spawn(|| shim.create_with("slow", bundle.path(), |request| runtime.choose(request)));
        let going = sandbox.directory().join("going");
        until("the runtime is in its call", || Ok(going.exists()))?;
        let left = leaves(daemon);
        fs::remove_file(&going)?;
        left
    })?;
    Ok(daemon)
}

/// SIGTERM comes when it has begun to take the place of its keeper.
fn a_daemon_that_is_to_end_does_not_become_the_keeper(stage: &Stage) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let (sandbox, shim, pid) = configured(stage, &directory.path().join("config.toml"))?;
    let daemon = leaves_within_a_call(&sandbox, &shim, |daemon| {
        sandbox.end_keeper()?;
        // It holds the keeper's lock before it leaves, and becomes the keeper after that.
        becomes_keeper(&sandbox, daemon)?;
        Ok(kill(Pid::from_raw(daemon), Signal::SIGTERM)?)
    })?;
    until("it ends", || Ok(!is_alive(daemon))).with_context(|| sandbox.daemon_log())?;
    let left = (sandbox.keeper_pid(), sandbox.daemon_pid());
    ensure!(left == (None, None), "{left:?}: {}", sandbox.daemon_log());
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    ensure!(shim.state("c")?.pid == pid, "another task");
    end(&shim)
}

/// SIGHUP comes first; then the keeper ends that would start the next daemon.
fn a_daemon_that_makes_way_takes_the_place_of_a_killed_keeper(stage: &Stage) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let (sandbox, shim, pid) = configured(stage, &directory.path().join("config.toml"))?;
    let daemon = leaves_within_a_call(&sandbox, &shim, |daemon| {
        kill(Pid::from_raw(daemon), Signal::SIGHUP)?;
        until("it leaves", || {
            let status = ask(stage, &sandbox, &["status", "--json"])?;
            Ok(status.stdout.contains("leaving"))
        })?;
        sandbox.end_keeper()
    })?;
    becomes_keeper(&sandbox, daemon)?;
    sandbox.successor_of(daemon)?;
    ensure!(shim.state("c")?.pid == pid, "another task");
    end(&shim)
}

//! A daemon that is killed while a thread of it waits for a file system that does not answer: its
//! process stays until that answers, and the next daemon does not wait for it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Shim, Stage, Test};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use testbed::sandbox::{Sandbox, is_alive, until};

use crate::hung::Frozen;
use crate::tests;

pub(crate) const TESTS: [Test; 3] = tests!(WithoutContainerd:
    a_killed_daemon_that_is_held_up_by_a_frozen_file_system_is_replaced,
    a_held_up_daemons_directory_is_not_taken_from_its_child,
    a_bundle_that_cannot_be_read_holds_up_no_take_over,
);

/// In seconds: the keeper has no other sign of the end of such a daemon.
const WATCHDOG: &str = "2";

/// A container, and an exec whose output waits for a frozen file system.
struct Stuck {
    /// Dropped first: thawed while it is mounted, or its processes wait for as long as the machine
    /// runs.
    frozen: Frozen,
    log: PathBuf,
    shim: Shim,
    pid: u32,
    sandbox: Sandbox,
}

impl Stuck {
    fn start(stage: &Stage) -> anyhow::Result<Self> {
        let mut sandbox = stage.bare_sandbox()?;
        sandbox.set_environment("EMBEDSHIM_WATCHDOG", WATCHDOG);
        sandbox.start_daemon()?;
        let shim = Shim::connect(&sandbox)?;
        let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
        let pid = shim.create("c", bundle.path())?;
        shim.start("c")?;
        let frozen = Frozen::mount(&sandbox)?;
        let log = frozen.at.join("log");
        let script = "while [ ! -e /dev/shm/go ]; do sleep 0.1; done; seq 3000 || busybox seq 3000";
        shim.exec_with("c", "e", &["sh", "-c", script], |request| {
            request.stdout = format!("file://{}", log.display());
        })?;
        shim.start_exec("c", "e")?;
        frozen.freeze()?;
        File::create(format!("/proc/{pid}/root/dev/shm/go"))?;
        let stuck = Self {
            frozen,
            log,
            shim,
            pid,
            sandbox,
        };
        stuck.is_held_up(stuck.daemon()?)?;
        Ok(stuck)
    }

    fn daemon(&self) -> anyhow::Result<i32> {
        self.sandbox.daemon_pid().context("no daemon")
    }

    /// Waits until one of its threads sleeps where no signal wakes it.
    fn is_held_up(&self, daemon: i32) -> anyhow::Result<()> {
        until("a thread waits for the file system", || {
            let threads = fs::read_dir(format!("/proc/{daemon}/task"))?.flatten();
            Ok(threads.into_iter().any(|thread| {
                let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
                stat.contains(") D ")
            }))
        })
        .with_context(|| self.sandbox.daemon_log())
    }

    /// Everything that the exec has said comes, and nothing is left of these daemons.
    fn thaw(&self, killed: &[i32]) -> anyhow::Result<()> {
        self.frozen.thaw()?;
        self.shim.wait_exec("c", "e")?;
        self.shim.delete_exec("c", "e")?;
        let text = fs::read_to_string(&self.log)?;
        let last = text.lines().last().unwrap_or_default();
        ensure!(
            last.trim() == "3000" && text.lines().count() >= 3000,
            "{last:?} of {} lines",
            text.lines().count()
        );
        until("the killed daemons end", || {
            let is_there = |pid: &i32| Path::new(&format!("/proc/{pid}")).exists();
            Ok(!killed.iter().any(is_there))
        })?;
        self.shim.kill("c", Signal::SIGKILL)?;
        ensure!(self.shim.wait("c")? == 137, "not 137");
        self.shim.delete("c")?;
        Ok(())
    }
}

/// Twice: the next daemon is held up by the same file system.
fn a_killed_daemon_that_is_held_up_by_a_frozen_file_system_is_replaced(
    stage: &Stage,
) -> anyhow::Result<()> {
    let stuck = Stuck::start(stage)?;
    let mut killed = Vec::new();
    for round in 0..2 {
        let daemon = stuck.daemon()?;
        stuck.is_held_up(daemon)?;
        kill(Pid::from_raw(daemon), Signal::SIGKILL)?;
        killed.push(daemon);
        stuck.sandbox.successor_of(daemon)?;
        ensure!(is_alive(daemon), "the killed daemon was not held up");
        ensure!(stuck.shim.state("c")?.pid == stuck.pid, "another task");
        // It does everything.
        let id = format!("other{round}");
        let bundle = Bundle::new(&stuck.sandbox, &id, &["sh", "-c", "exit 4"])?;
        stuck.shim.create(&id, bundle.path())?;
        stuck.shim.start(&id)?;
        ensure!(stuck.shim.wait(&id)? == 4, "not 4");
        stuck.shim.delete(&id)?;
    }
    stuck.thaw(&killed)
}

/// A child that is not the runtime yet has the lock as well, and may make a container (invariant
/// 18).
fn a_held_up_daemons_directory_is_not_taken_from_its_child(stage: &Stage) -> anyhow::Result<()> {
    let stuck = Stuck::start(stage)?;
    let daemon = stuck.daemon()?;
    let child = File::open(stuck.sandbox.state_dir().join("lock"))?;
    kill(Pid::from_raw(daemon), Signal::SIGKILL)?;
    until("another daemon has tried to take its place", || {
        Ok(stuck.sandbox.daemon_log().contains("embedshimd has failed"))
    })
    .with_context(|| stuck.sandbox.daemon_log())?;
    ensure!(stuck.daemon()? == daemon, "the directory was taken");
    drop(child);
    stuck.sandbox.successor_of(daemon)?;
    ensure!(is_alive(daemon), "the killed daemon was not held up");
    ensure!(stuck.shim.state("c")?.pid == stuck.pid, "another task");
    stuck.thaw(&[daemon])
}

/// What a successor has to know of a container's spec is recorded: its bundle may lie on what does
/// not answer, as a fifo does not.
fn a_bundle_that_cannot_be_read_holds_up_no_take_over(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let pid = shim.create("c", bundle.path())?;
    shim.start("c")?;
    let spec = bundle.path().join("config.json");
    fs::rename(&spec, bundle.path().join("kept"))?;
    mkfifo(&spec, Mode::S_IRWXU)?;
    sandbox.kill_daemon()?;
    ensure!(shim.state("c")?.pid == pid, "another task");
    let log = sandbox.daemon_log();
    ensure!(!log.contains("cannot read the bundle"), "{log}");
    shim.kill("c", Signal::SIGKILL)?;
    ensure!(shim.wait("c")? == 137, "not 137");
    shim.delete("c")?;
    Ok(())
}

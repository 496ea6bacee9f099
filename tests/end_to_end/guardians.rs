//! Daemon and keeper replace each other: whichever is killed or stands still, the other starts it
//! again, and neither containerd nor a container notices.

use std::fs;
use std::thread::scope;

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Footprint, Reader, Shim, Stage, Test, writer};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::sandbox::{PATIENCE, Running, Sandbox, is_alive, stop, until};

use crate::half_done::SlowRuntime;
use crate::survival::handles_term;
use crate::tests;

pub(crate) const TESTS: [Test; 7] = tests!(EmbedshimOnly:
    a_killed_keeper_is_replaced_and_its_successor_starts_daemons,
    a_keeper_that_is_killed_while_it_starts_a_daemon_is_replaced,
    a_zombie_outlives_the_keeper_that_would_have_had_it,
    a_request_under_way_outlives_the_keeper,
    streams_go_on_while_keeper_and_daemon_are_killed_in_turn,
    a_keeper_that_stands_still_is_replaced,
    a_daemon_that_stands_still_is_replaced,
);

/// In seconds, for tests that wait for it.
const WATCHDOG: &str = "3";

/// Kills the keeper alone, and waits until another keeper and the daemon that it has started are
/// there.
fn replace_keeper(sandbox: &Sandbox) -> anyhow::Result<()> {
    let keeper = sandbox.keeper_pid().context("no keeper")?;
    let daemon = sandbox.daemon_pid().context("no daemon")?;
    sandbox.end_keeper()?;
    keeper_is_replaced(sandbox, keeper, daemon)
}

fn keeper_is_replaced(sandbox: &Sandbox, keeper: i32, daemon: i32) -> anyhow::Result<()> {
    until("another keeper is there", || {
        Ok(sandbox.keeper_pid().is_some_and(|pid| pid != keeper))
    })
    .with_context(|| sandbox.daemon_log())?;
    let next = sandbox.successor_of(daemon)?;
    ensure!(
        sandbox.keeper_pid() == Some(daemon) && next != daemon,
        "the daemon has not become the keeper: {}",
        sandbox.daemon_log()
    );
    Ok(())
}

fn a_killed_keeper_is_replaced_and_its_successor_starts_daemons(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let mut client =
        Running::capture(&mut sandbox.run(&["--rm"], "c", &["guest", "until-term", "7"]))?;
    sandbox.wait_for_status("c", "RUNNING")?;
    let pid = sandbox.task("c")?.pid;
    handles_term(pid)?;
    for _ in 0..3 {
        replace_keeper(&sandbox)?;
        sandbox.kill_daemon()?;
        let task = sandbox.task("c")?;
        ensure!(
            (task.pid, task.status.as_str()) == (pid, "RUNNING"),
            "{task:?}"
        );
        sandbox.ctr_ok(&["task", "exec", "--exec-id", "e", "c", "true"])?;
    }
    kill(Pid::from_raw(pid), Signal::SIGTERM)?;
    let finished = client.finish(PATIENCE)?;
    ensure!(
        finished.code == Some(7),
        "{finished:?}: {}",
        sandbox.daemon_log()
    );
    Ok(())
}

/// At whatever moment of its start: the daemon has what the keeper gave it.
fn a_keeper_that_is_killed_while_it_starts_a_daemon_is_replaced(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let pid = shim.create("c", bundle.path())?;
    shim.start("c")?;
    for round in 0..10 {
        let keeper = sandbox.keeper_pid().context("no keeper")?;
        let daemon = sandbox.daemon_pid().context("no daemon")?;
        kill(Pid::from_raw(daemon), Signal::SIGKILL)?;
        let next = started_after(daemon, keeper)?;
        std::thread::sleep(std::time::Duration::from_millis(2 * round));
        sandbox.end_keeper()?;
        becomes_keeper(&sandbox, next)?;
        sandbox.successor_of(next)?;
        ensure!(shim.state("c")?.pid == pid, "another task");
    }
    end(&shim)
}

/// The process that this keeper has started after its daemon.
pub(crate) fn started_after(daemon: i32, keeper: i32) -> anyhow::Result<i32> {
    let children = format!("/proc/{keeper}/task/{keeper}/children");
    let mut next = None;
    until("the keeper starts another", || {
        let children = fs::read_to_string(&children)?;
        let mut pids = children
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok());
        next = pids.find(|&child| child != daemon && is_embedshimd(child));
        Ok(next.is_some())
    })?;
    next.context("no process")
}

pub(crate) fn becomes_keeper(sandbox: &Sandbox, daemon: i32) -> anyhow::Result<()> {
    until("another keeper is there", || {
        Ok(sandbox.keeper_pid() == Some(daemon))
    })
    .with_context(|| sandbox.daemon_log())
}

/// The container is its own, and ends as it was told.
pub(crate) fn end(shim: &Shim) -> anyhow::Result<()> {
    shim.kill("c", Signal::SIGKILL)?;
    ensure!(
        shim.wait("c")? == 137 && shim.delete("c")? == 137,
        "not 137"
    );
    Ok(())
}

fn is_embedshimd(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "embedshimd")
}

/// Without BPF only the zombie tells how a process has ended while no daemon was there.
fn a_zombie_outlives_the_keeper_that_would_have_had_it(stage: &Stage) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("config.toml");
    fs::write(&config, "[monitor]\nbackend = \"pidfd\"\n")?;
    let sandbox = stage.sandbox_with(&[("EMBEDSHIM_CONFIG", &config.to_string_lossy())])?;
    let pid = sandbox.detached(&[], "c", &["guest", "until-term", "9"])?;
    handles_term(pid)?;
    replace_keeper(&sandbox)?;
    // The next daemon does not start for a while.
    fs::write(&config, "nonsense")?;
    let daemon = sandbox.daemon_pid().context("no daemon")?;
    kill(Pid::from_raw(daemon), Signal::SIGKILL)?;
    until("another has failed", || {
        Ok(sandbox.daemon_log().contains("embedshimd has failed"))
    })?;
    kill(Pid::from_raw(pid), Signal::SIGTERM)?;
    until("the container has ended", || Ok(!is_alive(pid)))?;
    fs::write(&config, "[monitor]\nbackend = \"pidfd\"\n")?;
    sandbox.successor_of(daemon)?;
    sandbox.wait_for_status("c", "STOPPED")?;
    ensure!(sandbox.delete_task("c")? == 9, "the code was lost");
    Ok(())
}

fn a_request_under_way_outlives_the_keeper(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let runtime = SlowRuntime::new(&sandbox, "create", true)?;
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", "exit 5"])?;
    let before = Footprint::of(&sandbox);
    scope(|scope| {
        let request =
            scope.spawn(|| shim.create_with("c", bundle.path(), |request| runtime.choose(request)));
        let going = sandbox.directory().join("going");
        until("the runtime is in its call", || Ok(going.exists()))?;
        let (keeper, daemon) = (sandbox.keeper_pid(), sandbox.daemon_pid());
        sandbox.end_keeper()?;
        fs::remove_file(&going)?;
        request.join().ok().context("a request panicked")??;
        let (keeper, daemon) = (keeper.context("no keeper")?, daemon.context("no daemon")?);
        keeper_is_replaced(&sandbox, keeper, daemon)
    })?;
    shim.start("c")?;
    ensure!(shim.wait("c")? == 5 && shim.delete("c")? == 5, "not 5");
    before.wait_for_return(&sandbox)
}

fn streams_go_on_while_keeper_and_daemon_are_killed_in_turn(stage: &Stage) -> anyhow::Result<()> {
    use std::io::Write;

    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", "busybox cat; exit 3"])?;
    let (stdin, mut input) = writer(&sandbox, "in")?;
    let mut reader = Reader::new(&sandbox, "out")?;
    shim.create_with("c", bundle.path(), |request| {
        request.stdin = stdin.display().to_string();
        request.stdout = reader.path();
    })?;
    shim.start("c")?;
    for round in 0..3 {
        writeln!(input, "before keeper {round}")?;
        replace_keeper(&sandbox)?;
        writeln!(input, "before daemon {round}")?;
        sandbox.kill_daemon()?;
        reader.wait_for(&format!("before daemon {round}"))?;
    }
    shim.close_stdin("c")?;
    drop(input);
    ensure!(shim.wait("c")? == 3, "not 3");
    let text = reader.finish()?;
    let expected: Vec<String> = (0..3)
        .flat_map(|round| {
            [
                format!("before keeper {round}"),
                format!("before daemon {round}"),
            ]
        })
        .collect();
    ensure!(text.lines().eq(&expected), "{text:?}");
    ensure!(shim.delete("c")? == 3, "not 3");
    Ok(())
}

fn impatient(stage: &Stage) -> anyhow::Result<Sandbox> {
    let mut sandbox = stage.bare_sandbox()?;
    sandbox.set_environment("EMBEDSHIM_WATCHDOG", WATCHDOG);
    sandbox.start_daemon()?;
    Ok(sandbox)
}

fn a_keeper_that_stands_still_is_replaced(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = impatient(stage)?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let (keeper, daemon) = (sandbox.keeper_pid(), sandbox.daemon_pid());
    let (keeper, daemon) = (keeper.context("no keeper")?, daemon.context("no daemon")?);
    stop(Pid::from_raw(keeper))?;
    // What is new is kept, although the keeper has not heard of it.
    let pid = shim.create("c", bundle.path())?;
    shim.start("c")?;
    keeper_is_replaced(&sandbox, keeper, daemon)?;
    sandbox.kill_daemon()?;
    ensure!(shim.state("c")?.pid == pid, "another task");
    end(&shim)
}

fn a_daemon_that_stands_still_is_replaced(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = impatient(stage)?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let pid = shim.create("c", bundle.path())?;
    shim.start("c")?;
    let (keeper, daemon) = (
        sandbox.keeper_pid(),
        sandbox.daemon_pid().context("no daemon")?,
    );
    stop(Pid::from_raw(daemon))?;
    // The answer comes from the next one.
    ensure!(shim.state("c")?.pid == pid, "another task");
    ensure!(
        !is_alive(daemon) && sandbox.keeper_pid() == keeper,
        "another keeper"
    );
    let log = sandbox.daemon_log();
    ensure!(log.contains("does not answer the watchdog"), "{log}");
    end(&shim)
}

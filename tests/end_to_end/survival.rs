//! What is stopped and started while containers run and end.

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Footprint, Shim, Stage, Test};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::releases::Release;
use testbed::sandbox::{Sandbox, is_alive, until};

use crate::tests;

pub(crate) const TESTS: [Test; 2] = tests!(AnyRuntime:
    tasks_are_there_after_containerd_was_restarted,
    exits_while_containerd_is_down_are_known_afterwards,
);
pub(crate) const OURS: [Test; 5] = tests!(EmbedshimOnly:
    exits_while_nobody_is_there_are_known_afterwards,
    containers_outlive_the_daemon_and_go_on_under_the_next,
    an_exec_that_ends_while_nobody_is_there_is_known_afterwards,
    a_lost_daemon_leaves_nothing_behind,
    closed_input_stays_closed_for_the_next_daemon,
);

pub(crate) const UPGRADES: [Test; 1] = tests!(OtherContainerd:
    containers_outlive_the_upgrade_of_containerd,
);

fn end(pid: i32, signal: Signal) -> anyhow::Result<()> {
    kill(Pid::from_raw(pid), signal)?;
    until("it ends", || Ok(!is_alive(pid)))
}

/// Starts what handles SIGTERM, and waits until it does.
fn until_term(sandbox: &Sandbox, id: &str, code: &str) -> anyhow::Result<i32> {
    let pid = sandbox.detached(&[], id, &["guest", "until-term", code])?;
    handles_term(pid)?;
    Ok(pid)
}

/// Waits until a process has a handler for SIGTERM.
pub(crate) fn handles_term(pid: i32) -> anyhow::Result<()> {
    until("it handles SIGTERM", || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        Ok(mask
            .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
            .is_some_and(|mask| mask & (1 << 14) != 0))
    })
}

fn tasks_are_there_after_containerd_was_restarted(stage: &Stage) -> anyhow::Result<()> {
    let mut sandbox = stage.sandbox()?;
    let pid = sandbox.detached(&[], "running", &["sleep", "1000"])?;
    sandbox.detached(&[], "ended", &["sh", "-c", "exit 5"])?;
    sandbox.wait_for_status("ended", "STOPPED")?;
    sandbox.kill_containerd()?;
    sandbox.start_containerd()?;
    let running = sandbox.task("running")?;
    ensure!(
        (running.pid, running.status.as_str()) == (pid, "RUNNING"),
        "{running:?}"
    );
    ensure!(
        sandbox.task("ended")?.status == "STOPPED",
        "{:?}",
        sandbox.task("ended")?
    );
    ensure!(sandbox.delete_task("ended")? == 5, "the code was lost");
    sandbox.ctr_ok(&["task", "exec", "--exec-id", "e", "running", "true"])?;
    sandbox.ctr_ok(&["task", "kill", "--signal", "KILL", "running"])?;
    sandbox.wait_for_status("running", "STOPPED")?;
    ensure!(sandbox.delete_task("running")? == 137, "the code was lost");
    Ok(())
}

fn exits_while_containerd_is_down_are_known_afterwards(stage: &Stage) -> anyhow::Result<()> {
    let mut sandbox = stage.sandbox()?;
    let nine = until_term(&sandbox, "nine", "9")?;
    let killed = sandbox.detached(&[], "killed", &["sleep", "1000"])?;
    sandbox.stop_containerd()?;
    end(nine, Signal::SIGTERM)?;
    end(killed, Signal::SIGKILL)?;
    sandbox.start_containerd()?;
    for (id, code) in [("nine", 9), ("killed", 137)] {
        sandbox.wait_for_status(id, "STOPPED")?;
        let told = sandbox.delete_task(id)?;
        ensure!(told == code, "{id}: {told} instead of {code}");
    }
    Ok(())
}

fn exits_while_nobody_is_there_are_known_afterwards(stage: &Stage) -> anyhow::Result<()> {
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let mut sandbox = stage.sandbox()?;
        let nine = until_term(&sandbox, "nine", "9")?;
        let killed = sandbox.detached(&[], "killed", &["sleep", "1000"])?;
        let leader = sandbox.detached(&[], "leader", &["guest", "leader-first", "44", "1500"])?;
        sandbox.stop_containerd()?;
        sandbox.end_daemon(signal)?;
        end(nine, Signal::SIGTERM)?;
        end(killed, Signal::SIGKILL)?;
        until("the threads end", || {
            Ok(!std::path::Path::new(&format!("/proc/{leader}")).exists())
        })?;
        sandbox.start_daemon()?;
        sandbox.start_containerd()?;
        for (id, code) in [("nine", 9), ("killed", 137), ("leader", 44)] {
            sandbox.wait_for_status(id, "STOPPED")?;
            let told = sandbox.delete_task(id)?;
            ensure!(told == code, "{id}: {told} instead of {code}");
        }
    }
    Ok(())
}

fn containers_outlive_the_daemon_and_go_on_under_the_next(stage: &Stage) -> anyhow::Result<()> {
    let mut sandbox = stage.sandbox()?;
    let pid = sandbox.detached(&[], "c", &["sleep", "1000"])?;
    sandbox.detached(&[], "frozen", &["sleep", "1000"])?;
    sandbox.ctr_ok(&["task", "pause", "frozen"])?;
    sandbox.stop_containerd()?;
    sandbox.end_daemon(Signal::SIGKILL)?;
    sandbox.start_daemon()?;
    sandbox.start_containerd()?;
    let task = sandbox.task("c")?;
    ensure!(
        (task.pid, task.status.as_str()) == (pid, "RUNNING"),
        "{task:?}"
    );
    ensure!(
        sandbox.task("frozen")?.status == "PAUSED",
        "{:?}",
        sandbox.task("frozen")?
    );
    sandbox.ctr_ok(&["task", "exec", "--exec-id", "e", "c", "true"])?;
    sandbox.ctr_ok(&["task", "metrics", "c"])?;
    sandbox.ctr_ok(&["task", "resume", "frozen"])?;
    // Not our child any more: its status comes from the kernel's record.
    for id in ["c", "frozen"] {
        sandbox.ctr_ok(&["task", "kill", "--signal", "KILL", id])?;
        sandbox.wait_for_status(id, "STOPPED")?;
        ensure!(sandbox.delete_task(id)? == 137, "the code was lost");
    }
    Ok(())
}

fn an_exec_that_ends_while_nobody_is_there_is_known_afterwards(
    stage: &Stage,
) -> anyhow::Result<()> {
    let mut sandbox = stage.sandbox()?;
    let init = sandbox.detached(&[], "c", &["sleep", "1000"])?.to_string();
    sandbox.ctr_ok(&[
        "task",
        "exec",
        "--detach",
        "--exec-id",
        "e",
        "c",
        "sleep",
        "1001",
    ])?;
    let list = sandbox.ctr_ok(&["task", "ps", "c"])?;
    let mut pids = list
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next());
    let pid: i32 = pids
        .find(|pid| *pid != init)
        .context("the exec is not listed")?
        .parse()?;
    sandbox.stop_containerd()?;
    sandbox.end_daemon(Signal::SIGKILL)?;
    end(pid, Signal::SIGKILL)?;
    sandbox.start_daemon()?;
    sandbox.start_containerd()?;
    ensure!(
        sandbox.task("c")?.status == "RUNNING",
        "the container ended"
    );
    let code = Shim::connect(&sandbox)?.wait_exec("c", "e")?;
    ensure!(code == 137, "the exec ended with {code}");
    Ok(())
}

fn a_lost_daemon_leaves_nothing_behind(stage: &Stage) -> anyhow::Result<()> {
    // containerd destroys the containers of a connection it has lost, and nothing of them may stay.
    let sandbox = stage.sandbox()?;
    // The first container starts the daemon.
    sandbox.detached(&[], "first", &["true"])?;
    sandbox.wait_for_status("first", "STOPPED")?;
    sandbox.delete_task("first")?;
    let before = Footprint::of(&sandbox);
    let pids = [
        sandbox.detached(&[], "a", &["sleep", "1000"])?,
        sandbox.detached(&[], "b", &["sleep", "1000"])?,
    ];
    sandbox.end_daemon(Signal::SIGKILL)?;
    until("containerd has given them up", || {
        Ok(sandbox.find_task("a")?.is_none() && sandbox.find_task("b")?.is_none())
    })?;
    until("their processes are killed", || {
        Ok(!pids.iter().any(|&pid| is_alive(pid)))
    })?;
    before.wait_for_return(&sandbox)
}

fn closed_input_stays_closed_for_the_next_daemon(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    // It reads only after the restart, when its client is gone.
    let script = "until [ -e /go ]; do sleep 0.05; done; busybox cat; exit 8";
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", script])?;
    let stdin = sandbox.directory().join("stdin");
    nix::unistd::mkfifo(&stdin, nix::sys::stat::Mode::S_IRWXU)?;
    let shim = Shim::connect(&sandbox)?;
    shim.create_with("c", bundle.path(), |request| {
        request.stdin = stdin.to_string_lossy().into_owned();
    })?;
    shim.start("c")?;
    std::fs::write(&stdin, "input")?;
    shim.close_stdin("c")?;
    sandbox.end_daemon(Signal::SIGKILL)?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    std::fs::write(bundle.path().join("rootfs/go"), "")?;
    let code = shim.wait("c")?;
    ensure!(code == 8 && shim.delete("c")? == 8, "{code}");
    Ok(())
}

/// From the oldest by way of the middle to the one under test; each finds what the one before it
/// has started, and an exit that happened in between.
fn containers_outlive_the_upgrade_of_containerd(stage: &Stage) -> anyhow::Result<()> {
    let mut sandbox = stage.bare_sandbox()?;
    sandbox.use_programs(None);
    sandbox.start_containerd()?;
    sandbox.import(stage.archive())?;
    let pid = sandbox.detached(&[], "running", &["sleep", "1000"])?;
    let mut steps = vec![Release::Trixie.programs()?, stage.programs()];
    steps.dedup();
    for (number, programs) in steps.into_iter().enumerate() {
        let nine = format!("nine-{number}");
        let of_nine = until_term(&sandbox, &nine, "9")?;
        sandbox.stop_containerd()?;
        end(of_nine, Signal::SIGTERM)?;
        sandbox.use_programs(programs);
        sandbox.start_containerd()?;
        let task = sandbox.task("running")?;
        ensure!(
            (task.pid, task.status.as_str()) == (pid, "RUNNING"),
            "{task:?}"
        );
        sandbox.wait_for_status(&nine, "STOPPED")?;
        ensure!(sandbox.delete_task(&nine)? == 9, "the code was lost");
        let exec = format!("e-{number}");
        sandbox.ctr_ok(&["task", "exec", "--exec-id", &exec, "running", "true"])?;
    }
    sandbox.ctr_ok(&["task", "kill", "--signal", "KILL", "running"])?;
    sandbox.wait_for_status("running", "STOPPED")?;
    ensure!(sandbox.delete_task("running")? == 137, "the code was lost");
    sandbox.detached(&[], "new", &["sleep", "1000"]).map(drop)
}

//! Execs that are late: one whose start was cut short and whose process ends before our processes
//! look at it keeps its code, and one that is deleted after its container brings nothing back.

use std::fs;
use std::path::Path;
use std::thread::scope;

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Footprint, Reader, Shim, Stage, Test, write_program};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::sandbox::{Sandbox, is_alive, stop, until};

use crate::half_done::{SlowRuntime, end, fifo, join, start};
use crate::tests;

pub(crate) const TESTS: [Test; 5] = tests!(WithoutContainerd:
    an_exec_that_ends_while_a_slow_runtime_is_waited_for_keeps_its_code,
    an_exec_that_ends_while_the_next_daemon_stands_still_keeps_its_code,
    an_exec_whose_end_only_the_keeper_knows_keeps_its_code_when_the_keeper_is_upgraded,
    a_terminal_that_two_daemons_have_died_over_is_taken_by_the_third,
    an_exec_that_is_deleted_after_its_container_does_not_touch_the_next_of_that_id,
);

/// The pid that the runtime has written, when its process has ended.
fn pid_of_ended_exec(bundle: &Bundle) -> anyhow::Result<i32> {
    let file = bundle.path().join(".exec-e.pid");
    let pid = || {
        let text = fs::read_to_string(&file).ok()?;
        text.trim().parse::<i32>().ok()
    };
    until("the exec has ended", || {
        Ok(pid().is_some_and(|pid| !is_alive(pid)))
    })?;
    pid().context("no pid")
}

fn is_reaped(pid: i32) -> bool {
    !Path::new(&format!("/proc/{pid}")).exists()
}

/// Its parent is the keeper, which does not leave it a zombie for long.
fn an_exec_that_ends_while_a_slow_runtime_is_waited_for_keeps_its_code(
    stage: &Stage,
) -> anyhow::Result<()> {
    let (sandbox, shim) = start(stage)?;
    let runtime = SlowRuntime::new(&sandbox, "exec", true)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let before = Footprint::of(&sandbox);
    runtime.create(&shim, &bundle)?;
    shim.start("c")?;
    shim.exec_with("c", "e", &["sh", "-c", "exit 7"], |_| {})?;
    let waiting = Shim::connect(&sandbox)?;
    scope(|scope| {
        let wait = scope.spawn(|| waiting.wait_exec("c", "e"));
        let started = scope.spawn(|| shim.start_exec("c", "e"));
        let going = sandbox.directory().join("going");
        until("the runtime is in its call", || Ok(going.exists()))?;
        let pid = pid_of_ended_exec(&bundle)?;
        sandbox.kill_daemon()?;
        until("the exec is reaped", || Ok(is_reaped(pid)))?;
        fs::remove_file(&going)?;
        ensure!(join(started)?? == pid.unsigned_abs(), "another pid");
        let code = join(wait)??;
        ensure!(code == 7, "{code}");
        anyhow::Ok(())
    })?;
    ensure!(shim.delete_exec("c", "e")? == 7, "not 7");
    end(&sandbox, &shim, &before)
}

/// Only the keeper can know how it ended.
fn an_exec_that_ends_while_the_next_daemon_stands_still_keeps_its_code(
    stage: &Stage,
) -> anyhow::Result<()> {
    known_to_the_keeper_alone(stage, |_, daemon| Ok(kill(daemon, Signal::SIGCONT)?))
}

/// The keeper becomes another, and only then a daemon asks it.
fn an_exec_whose_end_only_the_keeper_knows_keeps_its_code_when_the_keeper_is_upgraded(
    stage: &Stage,
) -> anyhow::Result<()> {
    known_to_the_keeper_alone(stage, |sandbox, daemon| {
        let keeper = sandbox.keeper_pid().context("no keeper")?;
        kill(Pid::from_raw(keeper), Signal::SIGUSR2)?;
        until("the keeper is another", || {
            Ok(sandbox.daemon_log().contains("keeper replaced"))
        })?;
        // It would leave at the new keeper's word, if it did not stand still.
        kill(daemon, Signal::SIGKILL)?;
        sandbox.successor_of(daemon.as_raw()).map(drop)
    })
}

/// An exec's process ends and is reaped by the keeper while the only daemon stands still; then
/// `meanwhile` lets a daemon come to it.
fn known_to_the_keeper_alone(
    stage: &Stage,
    meanwhile: impl FnOnce(&Sandbox, Pid) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (sandbox, shim) = start(stage)?;
    let runtime = SlowRuntime::new(&sandbox, "exec", false)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let before = Footprint::of(&sandbox);
    runtime.create(&shim, &bundle)?;
    shim.start("c")?;
    shim.exec_with("c", "e", &["sh", "-c", "exit 7"], |_| {})?;
    let waiting = Shim::connect(&sandbox)?;
    scope(|scope| {
        let wait = scope.spawn(|| waiting.wait_exec("c", "e"));
        let started = scope.spawn(|| shim.start_exec("c", "e"));
        let going = sandbox.directory().join("going");
        until("the runtime is in its call", || Ok(going.exists()))?;
        let next = Pid::from_raw(sandbox.kill_daemon()?);
        stop(next)?;
        fs::remove_file(&going)?;
        let pid = pid_of_ended_exec(&bundle);
        let reaped = until("the exec is reaped", || {
            Ok(pid.as_ref().is_ok_and(|&pid| is_reaped(pid)))
        });
        let served = meanwhile(&sandbox, next);
        // Whatever has failed, the requests are to be answered.
        let _ = kill(next, Signal::SIGCONT);
        reaped.and(served)?;
        ensure!(join(started)?? == pid?.unsigned_abs(), "another pid");
        let code = join(wait)??;
        ensure!(code == 7, "{code}: {}", sandbox.daemon_log());
        anyhow::Ok(())
    })?;
    ensure!(shim.delete_exec("c", "e")? == 7, "not 7");
    end(&sandbox, &shim, &before)
}

/// The second daemon knows the exec already, and waits for the runtime.
fn a_terminal_that_two_daemons_have_died_over_is_taken_by_the_third(
    stage: &Stage,
) -> anyhow::Result<()> {
    let (sandbox, shim) = start(stage)?;
    let runtime = SlowRuntime::new(&sandbox, "exec", true)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let stdout = fifo(&sandbox, "out")?;
    let before = Footprint::of(&sandbox);
    runtime.create(&shim, &bundle)?;
    shim.start("c")?;
    let output = Reader::of(stdout.clone());
    let script = "test -t 1 && echo on a terminal; exit 6";
    shim.exec_with("c", "e", &["sh", "-c", script], |request| {
        request.terminal = true;
        request.stdout = stdout.to_string_lossy().into_owned();
    })?;
    scope(|scope| {
        let started = scope.spawn(|| shim.start_exec("c", "e"));
        let going = sandbox.directory().join("going");
        until("the runtime is in its call", || Ok(going.exists()))?;
        let identity = format!("\"pid\":{},", pid_of_ended_exec(&bundle)?);
        sandbox.kill_daemon()?;
        let tasks = sandbox.state_dir().join("tasks");
        until("the exec is in its task's record", || {
            let mut records = fs::read_dir(&tasks)?.flatten();
            let mut texts = records
                .by_ref()
                .map(|entry| fs::read_to_string(entry.path()));
            Ok(texts.any(|text| text.is_ok_and(|text| text.contains(&identity))))
        })?;
        runtime.kill_within(started)
    })??;
    output.wait_for("on a terminal")?;
    ensure!(shim.wait_exec("c", "e")? == 6, "not 6");
    end(&sandbox, &shim, &before)
}

/// The deletion of the exec waits for its logger, and ends when the id is another container's.
fn an_exec_that_is_deleted_after_its_container_does_not_touch_the_next_of_that_id(
    stage: &Stage,
) -> anyhow::Result<()> {
    let (sandbox, shim) = start(stage)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let (logger, directory) = (sandbox.directory().join("logger"), sandbox.directory());
    let script = format!(
        "#!/bin/sh\nPATH=/bin:/usr/bin\ncd {}\ntrap ': > told' TERM\nexec 5>&-\ncat <&3\n\
         while ! test -e go; do sleep 0.1; done\n",
        directory.display()
    );
    write_program(&logger, &script)?;
    let before = Footprint::of(&sandbox);
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    shim.exec_with("c", "e", &["true"], |request| {
        request.stdout = format!("binary://{}", logger.display());
    })?;
    shim.start_exec("c", "e")?;
    ensure!(shim.wait_exec("c", "e")? == 0, "not 0");
    let second = Shim::connect(&sandbox)?;
    scope(|scope| {
        let deleted = scope.spawn(|| second.delete_exec("c", "e"));
        until("the logger is told to end", || {
            Ok(directory.join("told").exists())
        })?;
        shim.kill("c", Signal::SIGKILL)?;
        shim.wait("c")?;
        shim.delete("c")?;
        let pid = shim.create("c", bundle.path())?;
        shim.start("c")?;
        fs::write(directory.join("go"), "")?;
        join(deleted)??;
        sandbox.kill_daemon()?;
        let after = shim.state("c")?;
        ensure!(after.pid == pid, "{after:?}");
        anyhow::Ok(())
    })?;
    end(&sandbox, &shim, &before)
}

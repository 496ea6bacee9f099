//! How processes end and what containerd is told.

use std::fs;

use anyhow::{bail, ensure};
use embedshim_tests::{Stage, Test};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xtask::sandbox::{Finished, PATIENCE, Running, Sandbox, until};

use crate::tests;

pub(crate) const TESTS: [Test; 8] = tests!(AnyRuntime:
    exit_codes_are_exact,
    death_by_a_signal_is_128_and_its_number,
    the_process_counts_and_not_its_main_thread,
    a_short_lived_container_never_loses_status_or_output,
    a_short_lived_exec_never_loses_status_or_output,
    a_grandchild_that_keeps_the_output_does_not_delay_the_exit,
    with_a_shared_pid_namespace_the_rest_is_killed,
    a_stopped_task_keeps_its_pid_and_status_until_deleted,
);

fn run(sandbox: &Sandbox, id: &str, command: &[&str]) -> anyhow::Result<Finished> {
    Running::capture(&mut sandbox.run(&["--rm"], id, command))?.finish(PATIENCE)
}

fn exit_codes_are_exact(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    for code in [0, 1, 2, 77, 126, 127, 128, 137, 255] {
        let finished = run(
            &sandbox,
            &format!("c{code}"),
            &["sh", "-c", &format!("exit {code}")],
        )?;
        ensure!(finished.code == Some(code), "{code}: {finished:?}");
    }
    Ok(())
}

fn death_by_a_signal_is_128_and_its_number(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let fault = run(&sandbox, "fault", &["guest", "fault"])?;
    ensure!(fault.code == Some(128 + 11), "SIGSEGV: {fault:?}");
    // The init of a pid namespace feels from outside only what it handles, and SIGKILL; so others are for its children.
    for (name, number) in [("TERM", 15), ("KILL", 9), ("HUP", 1), ("USR1", 10)] {
        let script = format!("sh -c 'kill -{name} $$'");
        let finished = run(
            &sandbox,
            &format!("s{number}"),
            &["sh", "-c", &format!("{script}; exit $?")],
        )?;
        ensure!(finished.code == Some(128 + number), "{name}: {finished:?}");
    }
    let pid = sandbox.detached(&[], "killed", &["sleep", "1000"])?;
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    sandbox.wait_for_status("killed", "STOPPED")?;
    let code = sandbox.delete_task("killed")?;
    ensure!(code == 137, "{code}");
    Ok(())
}

fn the_process_counts_and_not_its_main_thread(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let finished = run(&sandbox, "c", &["guest", "leader-first", "44", "50"])?;
    ensure!(finished.code == Some(44), "{finished:?}");
    Ok(())
}

fn a_short_lived_container_never_loses_status_or_output(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    for number in 0..40 {
        let finished = run(
            &sandbox,
            &format!("c{number}"),
            &["sh", "-c", &format!("echo {number}; exit {number}")],
        )?;
        let right = finished.code == Some(number) && finished.stdout == format!("{number}\n");
        ensure!(right, "{number}: {finished:?}");
    }
    Ok(())
}

fn a_short_lived_exec_never_loses_status_or_output(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&[], "c", &["sleep", "1000"])?;
    for number in 0..60 {
        let id = format!("e{number}");
        let mut ctr = sandbox.ctr(["task", "exec", "--fifo-dir"]);
        ctr.arg(sandbox.directory().join("fifo"))
            .args(["--exec-id", &id, "c"]);
        let command = format!("echo {number}; exit {number}");
        let finished = Running::capture(ctr.args(["sh", "-c", &command]))?.finish(PATIENCE)?;
        let right = finished.code == Some(number) && finished.stdout == format!("{number}\n");
        ensure!(right, "{number}: {finished:?}");
    }
    Ok(())
}

fn a_grandchild_that_keeps_the_output_does_not_delay_the_exit(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&[], "c", &["sleep", "1000"])?;
    let mut ctr = sandbox.ctr([
        "task",
        "exec",
        "--detach",
        "--exec-id",
        "e",
        "c",
        "guest",
        "orphan",
        "20000",
    ]);
    Running::capture(&mut ctr)?.finish(PATIENCE)?;
    // Far less than the grandchild's 20 s.
    let gone = |sandbox: &Sandbox| -> anyhow::Result<bool> {
        Ok(!sandbox.ctr_ok(&["task", "ps", "c"])?.contains("exec_id"))
    };
    until("the exec is reported as ended", || gone(&sandbox))
}

fn with_a_shared_pid_namespace_the_rest_is_killed(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let shared = ["--with-ns", "pid:/proc/1/ns/pid"];
    let pid = sandbox.detached(
        &shared,
        "c",
        &["sh", "-c", "sleep 1000 & exec guest until-term 4"],
    )?;
    let children = format!("/proc/{pid}/task/{pid}/children");
    let mut child = String::new();
    until("it has a child", || {
        fs::read_to_string(&children)?.trim().clone_into(&mut child);
        Ok(!child.is_empty())
    })?;
    until("it handles SIGTERM", || {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        Ok(caught
            .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
            .is_some_and(|mask| mask & (1 << 14) != 0))
    })?;
    kill(Pid::from_raw(pid), Signal::SIGTERM)?;
    sandbox.wait_for_status("c", "STOPPED")?;
    until("the child is killed", || {
        Ok(!xtask::sandbox::is_alive(child.parse()?))
    })?;
    match sandbox.delete_task("c")? {
        4 => Ok(()),
        other => bail!("exit code {other}"),
    }
}

fn a_stopped_task_keeps_its_pid_and_status_until_deleted(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let pid = sandbox.detached(&[], "c", &["sh", "-c", "exit 12"])?;
    ensure!(pid > 0, "a short-lived container lost its pid");
    sandbox.wait_for_status("c", "STOPPED")?;
    ensure!(sandbox.task("c")?.pid == pid, "the pid changed");
    let code = sandbox.delete_task("c")?;
    ensure!(code == 12, "{code}");
    ensure!(sandbox.find_task("c")?.is_none(), "the task is still there");
    Ok(())
}

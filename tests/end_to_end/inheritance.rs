//! What a container's runtime, hooks and loggers inherit: what containerd would have passed on to a
//! shim of the container's own, and nothing of the daemon's.

use std::fs;
use std::process::Command;

use anyhow::{Context, ensure};
use embedshim_tests::{Stage, Test, write_program};
use testbed::sandbox::{PATIENCE, Running};

use crate::tests;

pub(crate) const TESTS: [Test; 1] = tests!(AnyRuntime:
    a_runtime_inherits_from_the_containerd_that_creates,
);
pub(crate) const OURS: [Test; 2] = tests!(EmbedshimOnly:
    a_container_does_not_ignore_signal_32,
    the_thread_that_answers_is_scheduled_sooner_and_passes_it_on_to_none,
);

/// A first container, whose launcher starts the daemon; then containerd is started again with
/// another environment, in which runc is a program that notes its surroundings.
fn a_runtime_inherits_from_the_containerd_that_creates(stage: &Stage) -> anyhow::Result<()> {
    let mut sandbox = stage.sandbox()?;
    let finished =
        Running::capture(&mut sandbox.run(&["--rm"], "first", &["true"]))?.finish(PATIENCE)?;
    ensure!(finished.code == Some(0), "{finished:?}");
    let runc = Command::new("sh")
        .args(["-c", "command -v runc"])
        .output()?
        .stdout;
    let runc = String::from_utf8(runc)?;
    let programs = sandbox.directory().join("programs");
    let note = sandbox.directory().join("note");
    fs::create_dir(&programs)?;
    let text = format!(
        "#!/bin/sh\n{{ test -f config.json && echo bundle; env; echo limit $(ulimit -Sn); }} >{}\nexec {} \"$@\"\n",
        note.display(),
        runc.trim_end()
    );
    write_program(&programs.join("runc"), &text)?;
    sandbox.stop_containerd()?;
    let path = std::env::var("PATH")?;
    sandbox.set_environment("PATH", &format!("{}:{path}", programs.display()));
    sandbox.set_environment("HOME", "/home/containerd");
    sandbox.set_environment("HTTPS_PROXY", "http://127.0.0.1:1");
    sandbox.set_environment("NOTIFY_SOCKET", "/nowhere");
    sandbox.start_containerd()?;
    let finished = Running::capture(&mut sandbox.run(&["--rm", "--null-io"], "second", &["true"]))?
        .finish(PATIENCE)?;
    ensure!(finished.code == Some(0), "{finished:?}");
    let note = fs::read_to_string(note).context("the runtime has noted nothing")?;
    for line in [
        "bundle",
        "HTTPS_PROXY=http://127.0.0.1:1",
        "HOME=/home/containerd",
    ] {
        ensure!(
            note.lines().any(|found| found == line),
            "no {line:?}: {note}"
        );
    }
    ensure!(!note.contains("NOTIFY_SOCKET"), "{note}");
    Ok(())
}

/// glibc's `posix_spawn(3)` lets children ignore it, and theirs.
fn a_container_does_not_ignore_signal_32(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let mut run = sandbox.run(
        &["--rm"],
        "c",
        &["busybox", "grep", "SigIgn", "/proc/self/status"],
    );
    let finished = Running::capture(&mut run)?.finish(PATIENCE)?;
    let mask = finished.stdout.split_whitespace().last();
    let mask = u64::from_str_radix(mask.context("no mask")?, 16)?;
    ensure!(mask & (1 << 31) == 0, "{mask:x}");
    Ok(())
}

/// Its nice value is that of the daemon's first thread alone: neither its other threads have it,
/// nor what they start.
fn the_thread_that_answers_is_scheduled_sooner_and_passes_it_on_to_none(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let nice = ["busybox", "cut", "-d", " ", "-f", "19", "/proc/self/stat"];
    let init = Running::capture(&mut sandbox.run(&["--rm"], "init", &nice))?.finish(PATIENCE)?;
    ensure!(init.stdout == "0\n", "an init: {init:?}");
    sandbox.detached(&[], "c", &["sleep", "1000"])?;
    let mut exec = sandbox.ctr(["task", "exec", "--fifo-dir"]);
    exec.arg(sandbox.directory().join("fifo"));
    exec.args(["--exec-id", "e", "c"]).args(nice);
    let exec = Running::capture(&mut exec)?.finish(PATIENCE)?;
    ensure!(exec.stdout == "0\n", "an exec: {exec:?}");
    let daemon = sandbox.daemon_pid().context("no daemon")?;
    let may_raise = has_capability(SYS_NICE)?;
    for thread in fs::read_dir(format!("/proc/{daemon}/task"))? {
        let thread = thread?;
        let is_first = thread.file_name().to_str() == Some(&daemon.to_string());
        let expected = if is_first && may_raise { -5 } else { 0 };
        // It may have ended since.
        let Ok(stat) = fs::read_to_string(thread.path().join("stat")) else {
            continue;
        };
        ensure!(nice_of(&stat) == Some(expected), "not {expected}: {stat}");
    }
    Ok(())
}

/// `CAP_SYS_NICE`.
const SYS_NICE: u32 = 23;

fn has_capability(number: u32) -> anyhow::Result<bool> {
    let status = fs::read_to_string("/proc/self/status")?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = u64::from_str_radix(effective.context("no CapEff")?.trim(), 16)?;
    Ok(effective & (1 << number) != 0)
}

/// The nineteenth field; the second, a name in parentheses, may contain anything.
fn nice_of(stat: &str) -> Option<i32> {
    let (_, after_name) = stat.rsplit_once(") ")?;
    after_name.split(' ').nth(16)?.parse().ok()
}

//! A state directory that is removed or mounted over under a living daemon: one daemon and one
//! keeper go on, the next container finds them, and everything that is durable is there again.

use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};
use embedshim_tests::{Stage, Test};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use testbed::sandbox::{PATIENCE, Running, Sandbox, until};

use crate::tests;

pub(crate) const TESTS: [Test; 2] = tests!(EmbedshimOnly:
    a_container_right_after_the_removal_finds_the_same_daemon,
    a_file_system_mounted_over_it_holds_everything_again,
);

/// How many processes work on a state directory as this.
fn count(sandbox: &Sandbox, command: &str) -> anyhow::Result<usize> {
    let state_dir = sandbox.state_dir();
    let words = |line: Vec<u8>| -> Vec<String> {
        let words = line.split(|byte| *byte == 0);
        words
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect()
    };
    let is_one = |words: &[String]| {
        words
            .first()
            .is_some_and(|program| program.ends_with("embedshimd"))
            && words.get(1).is_some_and(|word| word == command)
            && words.iter().any(|word| Path::new(word) == state_dir)
    };
    let processes = fs::read_dir("/proc")?.flatten();
    let lines = processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
    Ok(lines.map(words).filter(|words| is_one(words)).count())
}

/// After whatever was done: a second container runs, one daemon and one keeper are there, the first
/// container is known to the next daemon, and the keeper can be upgraded.
fn goes_on(stage: &Stage, sandbox: &Sandbox) -> anyhow::Result<()> {
    let mut second = sandbox.run(&["--rm"], "second", &["sh", "-c", "echo here; exit 4"]);
    let finished = Running::capture(&mut second)?.finish(PATIENCE)?;
    ensure!(
        finished.code == Some(4) && finished.stdout == "here\n",
        "{finished:?}"
    );
    let counts = (count(sandbox, "serve")?, count(sandbox, "keep")?);
    ensure!(counts == (1, 1), "daemons and keepers: {counts:?}");
    let files = [
        "lock",
        "keeper.lock",
        "shim.sock",
        "admin.sock",
        "lives.json",
        "connections",
        "events",
        "tasks",
    ];
    until("all files are there", || {
        Ok(files
            .iter()
            .all(|file| sandbox.state_dir().join(file).exists()))
    })?;
    sandbox.kill_daemon()?;
    sandbox.wait_for_status("first", "RUNNING")?;
    // The daemon has said so there.
    until("there is a log", || {
        Ok(sandbox.state_dir().join("embedshimd.log").exists())
    })?;
    crate::terminals::upgrade(stage, sandbox)?;
    sandbox.ctr_ok(&["task", "kill", "--signal", "SIGKILL", "first"])?;
    sandbox.wait_for_status("first", "STOPPED")?;
    let code = sandbox.delete_task("first")?;
    ensure!(code == 137, "first ended with {code}");
    Ok(())
}

fn a_container_right_after_the_removal_finds_the_same_daemon(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&["--null-io"], "first", &["sleep", "1000"])?;
    fs::remove_dir_all(sandbox.state_dir())?;
    goes_on(stage, &sandbox)
}

fn a_file_system_mounted_over_it_holds_everything_again(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&["--null-io"], "first", &["sleep", "1000"])?;
    let state_dir = sandbox.state_dir();
    let nothing = None::<&str>;
    mount(
        nothing,
        &state_dir,
        Some("tmpfs"),
        MsFlags::empty(),
        nothing,
    )
    .context("tmpfs")?;
    let gone_on = goes_on(stage, &sandbox);
    // Its daemon is found by what is in there.
    drop(sandbox);
    let _ = umount2(&state_dir, MntFlags::MNT_DETACH);
    gone_on
}

//! Two containerds with one daemon, the same namespace and the same ids: what one does is done to
//! its own containers only.

use std::process::Command;

use anyhow::ensure;
use embedshim_tests::{Bundle, Shim, Stage, Test};
use nix::sys::signal::Signal;
use testbed::image;
use testbed::sandbox::{EMBEDSHIM, PATIENCE, Running, Sandbox};

use crate::tests;

pub(crate) const TESTS: [Test; 2] = tests!(EmbedshimOnly:
    a_failed_create_of_one_containerd_leaves_the_others_stopped_task,
    a_failed_create_is_no_way_to_the_others_task_after_the_daemons_death,
);

/// A second containerd, whose launcher finds the first one's daemon.
fn second(stage: &Stage, first: &Sandbox) -> anyhow::Result<Sandbox> {
    let mut second = stage.bare_sandbox()?;
    let state_dir = first.state_dir();
    second.set_environment("EMBEDSHIM_STATE_DIR", &state_dir.to_string_lossy());
    second.start_containerd()?;
    Ok(second)
}

/// `ctr` for the second containerd in the first one's namespace.
fn ctr(second: &Sandbox, first: &Sandbox, arguments: &[&str]) -> Command {
    let mut ctr = second.ctr(["--namespace", first.namespace()]);
    ctr.args(arguments);
    ctr
}

fn a_failed_create_of_one_containerd_leaves_the_others_stopped_task(
    stage: &Stage,
) -> anyhow::Result<()> {
    let first = stage.sandbox()?;
    let second = second(stage, &first)?;
    let archive = stage.archive().to_string_lossy();
    let finish = |command: &mut Command| Running::capture(command)?.finish(PATIENCE);
    let imported = finish(&mut ctr(&second, &first, &["image", "import", &archive]))?;
    ensure!(imported.code == Some(0), "{}", imported.stderr);
    first.detached(&[], "c", &["sh", "-c", "exit 7"])?;
    first.wait_for_status("c", "STOPPED")?;

    let run = [
        "run",
        "--runtime",
        EMBEDSHIM,
        "--detach",
        image::NAME,
        "c",
        "true",
    ];
    let refused = finish(&mut ctr(&second, &first, &run))?;
    ensure!(refused.code != Some(0), "two tasks have one id");
    ensure!(
        refused.stderr.contains("already exists"),
        "{}",
        refused.stderr
    );
    // What its failure makes containerd do is done.
    ensure!(first.task("c")?.status == "STOPPED", "another status");
    ensure!(first.delete_task("c")? == 7, "another exit code");

    let removed = finish(&mut ctr(&second, &first, &["container", "rm", "c"]))?;
    ensure!(removed.code == Some(0), "{}", removed.stderr);
    let ran = finish(&mut ctr(&second, &first, &run))?;
    ensure!(ran.code == Some(0), "the id is free: {}", ran.stderr);
    let deleted = finish(&mut ctr(&second, &first, &["task", "rm", "--force", "c"]))?;
    ensure!(deleted.code == Some(0), "{}", deleted.stderr);
    Ok(())
}

fn a_failed_create_is_no_way_to_the_others_task_after_the_daemons_death(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let (ours, theirs) = (Shim::connect(&sandbox)?, Shim::connect(&sandbox)?);
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", "exit 7"])?;
    let other = Bundle::new(&sandbox, "other", &["true"])?;
    ours.create("c", bundle.path())?;
    ours.start("c")?;
    ensure!(ours.wait("c")? == 7, "another exit code");
    let text = |refused: ttrpc::Result<u32>| {
        refused.map_or_else(|error| error.to_string(), |_| String::new())
    };
    let refused = text(theirs.create("c", other.path()));
    ensure!(refused.contains("already exists"), "{refused:?}");
    sandbox.replace_daemon(Signal::SIGKILL)?;
    let refused = text(theirs.delete("c"));
    ensure!(refused.contains("not found"), "{refused:?}");
    ensure!(ours.delete("c")? == 7, "another exit code");
    Ok(())
}

//! The descriptor store: what a container takes of it, and what becomes of it when the keeper is
//! stopped or full.

use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Footprint, Reader, Shim, Stage, Test, writer};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::sandbox::{Sandbox, until};

use crate::tests;

pub(crate) const TESTS: [Test; 3] = tests!(EmbedshimOnly:
    what_was_sent_to_a_stopped_keeper_is_kept_when_it_goes_on,
    a_stopped_keeper_holds_up_no_end_of_a_stream,
    a_container_with_three_streams_takes_two_places_beside_its_connection,
);

fn kept(sandbox: &Sandbox) -> anyhow::Result<usize> {
    let keeper = sandbox.keeper_pid().context("no keeper")?;
    let entries = fs::read_dir(format!("/proc/{keeper}/fd"))?.flatten();
    let is_socket = |path: &Path| {
        fs::read_link(path).is_ok_and(|link| link.to_string_lossy().starts_with("socket:"))
    };
    Ok(entries.filter(|entry| is_socket(&entry.path())).count())
}

fn stop(sandbox: &Sandbox) -> anyhow::Result<Pid> {
    let keeper = Pid::from_raw(sandbox.keeper_pid().context("no keeper")?);
    kill(keeper, Signal::SIGSTOP)?;
    Ok(keeper)
}

fn what_was_sent_to_a_stopped_keeper_is_kept_when_it_goes_on(stage: &Stage) -> anyhow::Result<()> {
    const CONTAINERS: usize = 8;
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let before = kept(&sandbox)?;
    let keeper = stop(&sandbox)?;
    // A queue that is full, and more than it holds.
    let others = (0..300)
        .map(|_| Shim::connect(&sandbox))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut containers = Vec::new();
    for number in 0..CONTAINERS {
        let id = format!("c{number}");
        let bundle = Bundle::new(&sandbox, &id, &["sh", "-c", "sleep 1000 & wait"])?;
        let reader = Reader::new(&sandbox, &format!("{id}-out"))?;
        let shim = Shim::connect(&sandbox)?;
        shim.create_with(&id, bundle.path(), |request| request.stdout = reader.path())?;
        shim.start(&id)?;
        containers.push((id, shim, reader));
    }
    drop(others);
    kill(keeper, Signal::SIGCONT)?;
    until("everything is kept", || {
        Ok(kept(&sandbox)? == before + 3 * CONTAINERS)
    })?;
    sandbox.kill_daemon()?;
    for (id, shim, reader) in &mut containers {
        shim.kill(id, Signal::SIGKILL).with_context(|| id.clone())?;
        ensure!(shim.wait(id)? == 137, "not 137");
        reader.finish()?;
        shim.delete(id)?;
    }
    Ok(())
}

/// Its client reads the end although the keeper lets go of nothing.
fn a_stopped_keeper_holds_up_no_end_of_a_stream(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", "busybox cat; exit 3"])?;
    let (stdin, input) = writer(&sandbox, "in")?;
    let mut reader = Reader::new(&sandbox, "out")?;
    shim.create_with("c", bundle.path(), |request| {
        request.stdin = stdin.display().to_string();
        request.stdout = reader.path();
    })?;
    shim.start("c")?;
    let keeper = stop(&sandbox)?;
    drop(input);
    shim.close_stdin("c")?;
    let result = reader.finish();
    let code = shim.wait("c")?;
    let deleted = shim.delete("c");
    kill(keeper, Signal::SIGCONT)?;
    ensure!(result?.is_empty() && code == 3 && deleted? == 3, "not 3");
    Ok(())
}

fn a_container_with_three_streams_takes_two_places_beside_its_connection(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let before = Footprint::of(&sandbox);
    let places = kept(&sandbox)?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["busybox", "cat"])?;
    let (stdin, _input) = writer(&sandbox, "in")?;
    let readers = [Reader::new(&sandbox, "out")?, Reader::new(&sandbox, "err")?];
    shim.create_with("c", bundle.path(), |request| {
        request.stdin = stdin.display().to_string();
        request.stdout = readers[0].path();
        request.stderr = readers[1].path();
    })?;
    shim.start("c")?;
    until("they are kept", || Ok(kept(&sandbox)? == places + 3))?;
    sandbox.kill_daemon()?;
    ensure!(kept(&sandbox)? == places + 3, "{}", kept(&sandbox)?);
    shim.kill("c", Signal::SIGKILL)?;
    shim.wait("c")?;
    shim.delete("c")?;
    until("they are let go", || Ok(kept(&sandbox)? == places + 1))?;
    before.wait_for_return(&sandbox)
}

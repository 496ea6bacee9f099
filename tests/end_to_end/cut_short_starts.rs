//! Calls of `start` of the OCI runtime that are killed: before they have done anything, in between,
//! and right after they have let the init go on. The request is done if and only if the container's
//! program runs, to this daemon and to the next one.

use std::fs;
use std::path::Path;
use std::thread::scope;

use anyhow::{Context, ensure};
use containerd_shim_protos::api;
use embedshim_tests::{Stage, Test, binary_name};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use testbed::sandbox::{self, Sandbox, until};

use crate::cut_short::{Scene, When, refusal};
use crate::tests;

pub(crate) const TESTS: [Test; 6] = tests!(WithoutContainerd:
    a_start_that_was_done_when_its_runtime_was_killed_is_done,
    a_start_that_was_not_done_when_its_runtime_was_killed_can_be_asked_again,
    a_start_is_known_though_its_runtime_was_killed_before_it_noted_that,
    a_start_is_known_to_the_next_daemon_though_the_runtime_was_killed_with_the_last,
    a_start_is_done_if_and_only_if_the_program_has_run,
    a_start_is_done_if_and_only_if_the_program_has_run_to_the_next_daemon_too,
);

fn a_start_that_was_done_when_its_runtime_was_killed_is_done(stage: &Stage) -> anyhow::Result<()> {
    let scene = Scene::set(stage, "start", When::After)?;
    let pid = scene.create()?;
    scene.runtime.arm()?;
    ensure!(scene.shim.start("c")? == pid, "another pid");
    scene.runtime.check_killed()?;
    scene.expect(api::Status::RUNNING)?;
    scene.end()
}

fn a_start_that_was_not_done_when_its_runtime_was_killed_can_be_asked_again(
    stage: &Stage,
) -> anyhow::Result<()> {
    let scene = Scene::set(stage, "start", When::Before)?;
    let pid = scene.create()?;
    scene.runtime.arm()?;
    let told = refusal(scene.shim.start("c"))?;
    ensure!(told.contains("OCI runtime start failed"), "{told}");
    scene.expect(api::Status::CREATED)?;
    ensure!(scene.shim.start("c")? == pid, "another pid");
    scene.end()
}

/// What `runc` leaves that is killed between the start of the init and the removal of its fifo: it
/// takes such a container for one that is not started, for as long as it lives.
fn with_fifo(sandbox: &Sandbox) -> String {
    let root = Path::new("/run/containerd/runc").join(sandbox.namespace());
    format!("mkfifo {}/c/exec.fifo", root.display())
}

fn a_start_is_known_though_its_runtime_was_killed_before_it_noted_that(
    stage: &Stage,
) -> anyhow::Result<()> {
    let scene = Scene::set_with(stage, "start", When::After, with_fifo)?;
    let pid = scene.create()?;
    scene.runtime.arm()?;
    ensure!(scene.shim.start("c")? == pid, "another pid");
    scene.runtime.check_killed()?;
    scene.runs_for_runc()?;
    scene.pause()?;
    scene.sandbox.kill_daemon()?;
    scene.expect(api::Status::PAUSED)?;
    scene.resume()?;
    scene.sandbox.kill_daemon()?;
    scene.expect(api::Status::RUNNING)?;
    scene.end()
}

fn a_start_is_known_to_the_next_daemon_though_the_runtime_was_killed_with_the_last(
    stage: &Stage,
) -> anyhow::Result<()> {
    let scene = Scene::set_with(stage, "start", When::After, |sandbox| {
        let (fifo, directory) = (with_fifo(sandbox), sandbox.directory().display());
        let wait = format!("while [ ! -e {directory}/go ]; do sleep 0.02; done");
        format!("{fifo}; touch {directory}/called; {wait}")
    })?;
    let pid = scene.create()?;
    scene.runtime.arm()?;
    let directory = scene.sandbox.directory();
    let started = scope(|scope| {
        let request = scope.spawn(|| scene.shim.start("c"));
        until("the runtime has started it", || {
            Ok(directory.join("called").exists())
        })?;
        scene.sandbox.kill_daemon()?;
        fs::write(directory.join("go"), "")?;
        request.join().ok().context("a request panicked")
    })??;
    ensure!(started == pid, "another pid");
    scene.runtime.check_killed()?;
    scene.runs_for_runc()?;
    scene.end()
}

fn a_start_is_done_if_and_only_if_the_program_has_run(stage: &Stage) -> anyhow::Result<()> {
    check_starts(stage, |scene, _| Ok(scene.shim.start("c")))
}

fn a_start_is_done_if_and_only_if_the_program_has_run_to_the_next_daemon_too(
    stage: &Stage,
) -> anyhow::Result<()> {
    check_starts(stage, |scene, round| {
        let directory = scene.sandbox.directory();
        // The next daemon dies at a step of its own.
        fs::write(
            scene.sandbox.state_dir().join("failpoint"),
            round.to_string(),
        )?;
        let held = directory.join("held");
        fs::write(&held, "")?;
        scope(|scope| {
            let request = scope.spawn(|| scene.shim.start("c"));
            until("the runtime has opened the fifo", || {
                Ok(directory.join("opened").exists())
            })?;
            // Neither this daemon nor a call that goes on tells the next one.
            let daemon = scene.sandbox.daemon_pid().context("no daemon")?;
            sandbox::stop(Pid::from_raw(daemon))?;
            fs::remove_file(held)?;
            until("the runtime is gone", || {
                Ok(directory.join("gone").exists())
            })?;
            scene.sandbox.kill_daemon()?;
            let is_armed = !scene.sandbox.state_dir().join("failpoint").exists();
            ensure!(is_armed, "there are no failpoints in this daemon");
            request.join().ok().context("a request panicked")
        })
    })
}

/// With a runtime that has opened the fifo at which the init waits, and is killed before it reads:
/// mostly the init ends then by itself, without having run the program.
fn check_starts(
    stage: &Stage,
    start: impl Fn(&Scene, u32) -> anyhow::Result<ttrpc::Result<u32>>,
) -> anyhow::Result<()> {
    const ROUNDS: u32 = 12;
    let scene = Scene::set_with(stage, "start", When::Before, |sandbox| {
        let root = Path::new("/run/containerd/runc").join(sandbox.namespace());
        let directory = sandbox.directory().display();
        format!(
            "exec 3< {}/c/exec.fifo; exec 3<&-; touch {directory}/opened; \
             while [ -e {directory}/held ]; do sleep 0.02; done;",
            root.display()
        )
    })?;
    let output = scene.sandbox.directory().join("out");
    scene.bundle.edit(|spec| {
        if let Some(words) = spec.pointer_mut("/process/args") {
            *words = serde_json::json!(["sh", "-c", "echo it runs; exec sleep 1000"]);
        }
    })?;
    let has_run = || Ok(fs::read_to_string(&output)?.contains("it runs"));
    for round in 0..ROUNDS {
        fs::write(&output, "")?;
        let _ = fs::remove_file(scene.sandbox.directory().join("opened"));
        scene
            .shim
            .create_with("c", scene.bundle.path(), |request| {
                request.options = binary_name(&scene.runtime.program);
                request.stdout = format!("file://{}", output.display());
            })?;
        scene.runtime.arm()?;
        let started = start(&scene, round)?;
        scene.runtime.check_killed()?;
        if started.is_ok() {
            until("its program runs", has_run)
                .with_context(|| format!("round {round}: {:?}", scene.shim.state("c")))?;
            scene.shim.kill("c", Signal::SIGKILL)?;
            ensure!(scene.shim.wait("c")? == 137, "not 137");
        } else {
            // Whatever the runtime's own code ends with, it ends, or waits for its start.
            let _ = scene.shim.kill("c", Signal::SIGKILL);
            scene.shim.wait("c")?;
        }
        scene.shim.delete("c")?;
        ensure!(
            has_run()? == started.is_ok(),
            "round {round}: {started:?}, and it has run: {}",
            has_run()?
        );
        scene.before.wait_for_return(&scene.sandbox)?;
    }
    Ok(())
}

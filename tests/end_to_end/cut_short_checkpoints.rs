//! Checkpoints that are killed while the container is frozen for them: it is thawed.

use std::fs;

use anyhow::{Context, ensure};
use containerd_shim_protos::api;
use embedshim_tests::{Shim, Stage, Test};
use testbed::sandbox::until;

use crate::checkpoint::checkpoint;
use crate::cut_short::{Scene, When, refusal};
use crate::tests;

pub(crate) const TESTS: [Test; 2] = tests!(WithoutContainerd:
    a_container_that_a_killed_checkpoint_has_frozen_is_thawed,
    a_container_that_a_checkpoint_of_a_killed_daemon_has_frozen_is_thawed,
);

/// What the runtime has started, as CRIU, freezes the container after the runtime was killed.
fn a_container_that_a_killed_checkpoint_has_frozen_is_thawed(stage: &Stage) -> anyhow::Result<()> {
    let scene = Scene::set_with(stage, "checkpoint", When::Before, |sandbox| {
        let namespace = sandbox.namespace();
        format!(
            "( sleep 0.5; cd /sys/fs/cgroup; \
             [ ! -e freezer/{namespace}/c ] || echo FROZEN > freezer/{namespace}/c/freezer.state; \
             [ ! -e {namespace}/c ] || echo 1 > {namespace}/c/cgroup.freeze ) > /dev/null 2>&1 &"
        )
    })?;
    scene.create()?;
    scene.shim.start("c")?;
    scene.runtime.arm()?;
    let image = scene.sandbox.directory().join("image");
    let told = refusal(checkpoint(&scene.shim, "c", &image, false))?;
    ensure!(told.contains("OCI runtime checkpoint failed"), "{told}");
    scene.runtime.check_killed()?;
    executes(&scene)?;
    scene.end()
}

/// Runtime and daemon are killed while the container is frozen, and the client has gone: nothing
/// asks again.
fn a_container_that_a_checkpoint_of_a_killed_daemon_has_frozen_is_thawed(
    stage: &Stage,
) -> anyhow::Result<()> {
    let scene = Scene::set_with(stage, "checkpoint", When::Before, |sandbox| {
        format!(
            "runc --root /run/containerd/runc/{} pause c; touch {waits}; \
             while [ -e {waits} ]; do sleep 0.02; done; kill -KILL $(head -n 1 {lock});",
            sandbox.namespace(),
            waits = sandbox.directory().join("waits").display(),
            lock = sandbox.state_dir().join("lock").display(),
        )
    })?;
    scene.create()?;
    scene.shim.start("c")?;
    let daemon = scene.sandbox.daemon_pid().context("no daemon")?;
    scene.runtime.arm()?;
    let image = scene.sandbox.directory().join("image");
    let impatient = Shim::connect(&scene.sandbox)?;
    let request = api::CheckpointTaskRequest {
        id: "c".into(),
        path: image.to_string_lossy().into_owned(),
        ..api::CheckpointTaskRequest::default()
    };
    let mut metadata = impatient.metadata();
    metadata.timeout_nano = 1_000_000_000;
    let told = refusal(impatient.tasks.checkpoint(metadata, &request))?;
    ensure!(told.to_lowercase().contains("timeout"), "{told}");
    drop(impatient);
    let waits = scene.sandbox.directory().join("waits");
    until("the container is frozen", || Ok(waits.exists()))?;
    fs::remove_file(waits)?;
    scene.sandbox.successor_of(daemon)?;
    scene.runtime.check_killed()?;
    until("it is thawed", || Ok(scene.runc_says()? == "running"))?;
    executes(&scene)?;
    scene.end()
}

/// An exec in a frozen container does not begin.
fn executes(scene: &Scene) -> anyhow::Result<()> {
    let Scene { shim, .. } = scene;
    shim.exec_with("c", "e", &["sh", "-c", "exit 7"], |_| {})?;
    shim.start_exec("c", "e")?;
    ensure!(shim.wait_exec("c", "e")? == 7, "not 7");
    shim.delete_exec("c", "e").map(drop).map_err(Into::into)
}

//! Execs whose OCI runtime is killed within the call that starts them: a start that is refused
//! leaves nothing that runs, and nothing in the way of another.

use std::fs;

use anyhow::ensure;
use containerd_shim_protos::api;
use embedshim_tests::{Reader, Stage, Test};
use testbed::sandbox::until;

use crate::cut_short::{Scene, When, refusal};
use crate::half_done::fifo;
use crate::tests;

pub(crate) const TESTS: [Test; 2] = tests!(EmbedshimOnly:
    a_refused_exec_does_not_run_though_its_runtime_has_left_more_than_one_process,
    an_exec_whose_runtime_was_killed_does_not_hinder_the_next_of_its_name,
);

/// runc has three processes for a moment, of which one becomes the exec: here it is beside one that
/// executes the runtime's program for half a second.
fn a_refused_exec_does_not_run_though_its_runtime_has_left_more_than_one_process(
    stage: &Stage,
) -> anyhow::Result<()> {
    refused_exec(stage, false)?;
    // In a pod that shares its processes: there only its pipes tell the exec from others.
    refused_exec(stage, true)
}

fn refused_exec(stage: &Stage, shares_pids: bool) -> anyhow::Result<()> {
    let scene = Scene::set_with(stage, "exec", When::Before, |sandbox| {
        let directory = sandbox.directory().display();
        let namespace = sandbox.namespace();
        format!(
            "words=; for word in \"$@\"; do \
             case $before in --pid-file) word={directory}/hidden;; esac; \
             words=\"$words $word\"; before=$word; done; runc $words; \
             {directory}/copy/cut-short-runc 0.5 & \
             for each in /sys/fs/cgroup/*/{namespace}/c /sys/fs/cgroup/{namespace}/c; do \
             [ -e $each ] && echo $! > $each/cgroup.procs; done"
        )
    })?;
    let copy = scene.sandbox.directory().join("copy");
    fs::create_dir_all(&copy)?;
    fs::copy("/bin/sleep", copy.join("cut-short-runc"))?;
    scene.bundle.edit(|spec| {
        let namespaces = spec.pointer_mut("/linux/namespaces");
        if let (true, Some(serde_json::Value::Array(all))) = (shares_pids, namespaces) {
            all.retain(|each| each.get("type").and_then(|kind| kind.as_str()) != Some("pid"));
        }
    })?;
    let pid = scene.create()?;
    scene.shim.start("c")?;
    let stdout = fifo(&scene.sandbox, "out")?;
    let _output = Reader::of(stdout.clone());
    scene
        .shim
        .exec_with("c", "e", &["sleep", "1000"], |request| {
            request.stdout = stdout.to_string_lossy().into_owned();
        })?;
    scene.runtime.arm()?;
    let told = refusal(scene.shim.start_exec("c", "e"))?;
    ensure!(told.contains("OCI runtime exec failed"), "{told}");
    scene.runtime.check_killed()?;
    until("nothing but the init is left", || {
        let request = api::PidsRequest {
            id: "c".into(),
            ..api::PidsRequest::default()
        };
        let shim = &scene.shim;
        let answer = shim.tasks.pids(shim.metadata(), &request)?;
        let pids: Vec<u32> = answer.processes.iter().map(|entry| entry.pid).collect();
        Ok(pids == [pid])
    })?;
    scene.end()
}

/// runc does not overwrite what it has begun to write of the pid.
fn an_exec_whose_runtime_was_killed_does_not_hinder_the_next_of_its_name(
    stage: &Stage,
) -> anyhow::Result<()> {
    let scene = Scene::set_with(stage, "exec", When::Before, |sandbox| {
        let bundle = sandbox.directory().join("bundles/c");
        format!("touch {}/..exec-e.pid", bundle.display())
    })?;
    scene.create()?;
    scene.shim.start("c")?;
    let command = ["sh", "-c", "exit 7"];
    scene.shim.exec_with("c", "e", &command, |_| {})?;
    scene.runtime.arm()?;
    let told = refusal(scene.shim.start_exec("c", "e"))?;
    ensure!(told.contains("OCI runtime exec failed"), "{told}");
    scene.runtime.check_killed()?;
    scene.shim.delete_exec("c", "e")?;
    scene.shim.exec_with("c", "e", &command, |_| {})?;
    scene.shim.start_exec("c", "e")?;
    ensure!(scene.shim.wait_exec("c", "e")? == 7, "not 7");
    scene.shim.delete_exec("c", "e")?;
    scene.end()
}

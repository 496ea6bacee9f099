//! Execs whose OCI runtime is killed within the call that starts them: a start that is refused
//! leaves nothing that runs, and nothing in the way of another.

use std::fs;
use std::thread::scope;

use anyhow::{Context, ensure};
use containerd_shim_protos::api;
use embedshim_tests::{Reader, Shim, Stage, Test, write_program};
use testbed::sandbox::until;

use crate::cut_short::{Scene, When, refusal};
use crate::half_done::{fifo, join};
use crate::tests;

pub(crate) const TESTS: [Test; 3] = tests!(WithoutContainerd:
    a_refused_exec_does_not_run_though_its_runtime_has_left_more_than_one_process,
    an_exec_whose_runtime_was_killed_does_not_hinder_the_next_of_its_name,
    an_exec_that_its_waiter_was_told_never_ran_is_not_started_by_the_next_daemon,
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
    let mut pids = Vec::new();
    until("nothing but the init is left", || {
        let request = api::PidsRequest {
            id: "c".into(),
            ..api::PidsRequest::default()
        };
        let shim = &scene.shim;
        let answer = shim.tasks.pids(shim.metadata(), &request)?;
        pids = answer.processes.iter().map(|entry| entry.pid).collect();
        Ok(pids == [pid])
    })
    .with_context(|| {
        let command = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/cmdline"));
        let commands: Vec<_> = pids.iter().map(command).collect();
        format!("{told}\n{commands:?}\n{}", scene.sandbox.daemon_log())
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

/// The daemon dies between the answers to `Wait` and `Start`: it waits for the logger to end.
fn an_exec_that_its_waiter_was_told_never_ran_is_not_started_by_the_next_daemon(
    stage: &Stage,
) -> anyhow::Result<()> {
    let scene = Scene::set_with(stage, "exec", When::Before, |_| String::new())?;
    let (directory, shim) = (scene.sandbox.directory(), &scene.shim);
    let logger = directory.join("logger");
    let script = format!(
        "#!/bin/sh\nPATH=/bin:/usr/bin\ncd {}\ntrap : TERM\nexec 5>&-\ncat <&3\n\
         while ! test -e go; do sleep 0.1; done\n",
        directory.display()
    );
    write_program(&logger, &script)?;
    scene.create()?;
    shim.start("c")?;
    shim.exec_with("c", "e", &["sh", "-c", "exit 7"], |request| {
        request.stdout = format!("binary://{}", logger.display());
    })?;
    scene.runtime.arm()?;
    let second = Shim::connect(&scene.sandbox)?;
    let told = scope(|scope| {
        let started = scope.spawn(|| shim.start_exec("c", "e"));
        let code = second.wait_exec("c", "e")?;
        ensure!(code == 0, "{code}");
        scene.sandbox.kill_daemon()?;
        fs::write(directory.join("go"), "")?;
        refusal(join(started)?)
    })?;
    ensure!(told.contains("OCI runtime exec failed"), "{told}");
    scene.runtime.check_killed()?;
    shim.delete_exec("c", "e")?;
    scene.end()
}

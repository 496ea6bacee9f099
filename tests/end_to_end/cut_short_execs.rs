//! Execs whose OCI runtime is killed within the call that starts them: a start that is refused
//! leaves nothing that runs, and nothing in the way of another.

use std::fs;
use std::thread::scope;

use anyhow::{Context, ensure};
use containerd_shim_protos::api;
use embedshim_tests::{Reader, Shim, Stage, Test, write_program};
use testbed::sandbox::{Sandbox, until};

use crate::cut_short::{Scene, When, refusal};
use crate::half_done::{fifo, join};
use crate::tests;

pub(crate) const TESTS: [Test; 4] = tests!(WithoutContainerd:
    a_refused_exec_does_not_run_though_its_runtime_has_left_more_than_one_process,
    an_exec_whose_runtime_was_killed_does_not_hinder_the_next_of_its_name,
    an_exec_whose_refusal_was_cut_short_runs_with_its_streams_or_not_at_all,
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

/// The runtime starts the exec, and no pid file tells of that.
fn unreported(sandbox: &Sandbox) -> String {
    format!(
        "words=; for word in \"$@\"; do \
         case $before in --pid-file) word={}/hidden;; esac; \
         words=\"$words $word\"; before=$word; done; runc $words",
        sandbox.directory().display()
    )
}

fn refused_exec(stage: &Stage, shares_pids: bool) -> anyhow::Result<()> {
    let scene = Scene::set_with(stage, "exec", When::Before, |sandbox| {
        let directory = sandbox.directory().display();
        let namespace = sandbox.namespace();
        format!(
            "{unreported}; \
             {directory}/copy/cut-short-runc 0.5 & \
             for each in /sys/fs/cgroup/*/{namespace}/c /sys/fs/cgroup/{namespace}/c; do \
             [ -e $each ] && echo $! > $each/cgroup.procs; done",
            unreported = unreported(sandbox)
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
    let mut left = Vec::new();
    until("nothing but the init is left", || {
        left = pids(&scene.shim)?;
        Ok(left == [pid])
    })
    .with_context(|| {
        let command = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/cmdline"));
        let commands: Vec<_> = left.iter().map(command).collect();
        format!("{told}\n{commands:?}\n{}", scene.sandbox.daemon_log())
    })?;
    scene.end()
}

/// The processes of the container.
fn pids(shim: &Shim) -> anyhow::Result<Vec<u32>> {
    let request = api::PidsRequest {
        id: "c".into(),
        ..api::PidsRequest::default()
    };
    let answer = shim.tasks.pids(shim.metadata(), &request)?;
    Ok(answer.processes.iter().map(|entry| entry.pid).collect())
}

/// The daemon that refuses it, since its runtime was killed, dies at each of its steps.
fn an_exec_whose_refusal_was_cut_short_runs_with_its_streams_or_not_at_all(
    stage: &Stage,
) -> anyhow::Result<()> {
    const STEPS: u32 = 24;
    let scene = Scene::set_with(stage, "exec", When::Before, unreported)?;
    let shim = &scene.shim;
    let pid = scene.create()?;
    shim.start("c")?;
    let (failpoint, mut deaths) = (scene.sandbox.state_dir().join("failpoint"), 0);
    for step in 1..=STEPS {
        let exec = format!("e{step}");
        let stdout = fifo(&scene.sandbox, &exec)?;
        let mut output = Reader::of(stdout.clone());
        let command = ["sh", "-c", "sleep 2; echo it runs; exit 7"];
        shim.exec_with("c", &exec, &command, |request| {
            request.stdout = stdout.to_string_lossy().into_owned();
        })?;
        // That it is armed.
        fs::write(&failpoint, step.to_string())?;
        scene.sandbox.kill_daemon()?;
        scene.runtime.arm()?;
        let daemon = scene.sandbox.daemon_pid();
        let started = shim.start_exec("c", &exec);
        scene.runtime.check_killed()?;
        deaths += u32::from(scene.sandbox.daemon_pid() != daemon);
        let context = || format!("step {step}: {started:?}\n{}", scene.sandbox.daemon_log());
        if started.is_ok() {
            ensure!(shim.wait_exec("c", &exec)? == 7, "not 7: {}", context());
            let read = output.finish()?;
            ensure!(read == "it runs\n", "{read:?}: {}", context());
        } else {
            until("nothing but the init is left", || Ok(pids(shim)? == [pid]))
                .with_context(context)?;
        }
        shim.delete_exec("c", &exec)?;
    }
    ensure!(deaths > 0, "no daemon died: are there failpoints in it?");
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

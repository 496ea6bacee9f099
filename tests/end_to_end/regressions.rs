//! What shims got wrong before: a test for each entry of `docs/shim-contract.md`, "Regressions",
//! that no other module has. The number is the entry's.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use containerd_shim_protos::api;
use embedshim_tests::{Bundle, Footprint, Heard, Listener, Shim, Stage, Test};
use nix::sys::signal::Signal;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use serde_json::json;
use shim_api::bundle::BundleNote;
use testbed::sandbox::{PATIENCE, Running, Sandbox, until};

use crate::tests;

pub(crate) const TESTS: [Test; 10] = tests!(EmbedshimOnly:
    nr_4_no_exec_is_started_after_the_inits_exit,
    nr_5_the_inits_exit_is_not_delayed_by_a_stream_of_execs,
    nr_6_an_init_that_dies_during_create_is_an_error_and_leaves_nothing,
    nr_7_a_long_create_blocks_nobody,
    nr_11_a_failed_exec_on_a_terminal_leaks_nothing,
    nr_15_of_execs_with_the_same_id_one_wins,
    nr_18_a_missing_command_is_an_error_and_no_exit,
    nr_21_what_was_started_and_never_created_is_gone_after_a_restart,
    nr_24_a_shutdown_ends_neither_the_daemon_nor_a_task,
    the_streams_belong_to_io_gid,
);

fn with_daemon(stage: &Stage) -> anyhow::Result<(Sandbox, Shim)> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    Ok((sandbox, shim))
}

/// A bundle whose events a listener hears.
fn heard_bundle(
    sandbox: &Sandbox,
    listener: &Listener,
    id: &str,
    command: &[&str],
) -> anyhow::Result<Bundle> {
    let bundle = Bundle::new(sandbox, id, command)?;
    let note = BundleNote {
        events: listener.path().display().to_string(),
        ..BundleNote::default()
    };
    note.write(bundle.path())?;
    Ok(bundle)
}

/// Makes the runtime run a shell script between the making of the container and the return of
/// `create`.
fn hook(sandbox: &Sandbox, bundle: &Bundle, script: &str) -> anyhow::Result<()> {
    let path = sandbox.directory().join("hook");
    fs::write(&path, format!("#!/bin/sh\n{script}\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    bundle.edit(|spec| {
        if let Some(spec) = spec.as_object_mut() {
            spec.insert(
                "hooks".into(),
                json!({ "createRuntime": [{ "path": path, "args": ["hook"] }] }),
            );
        }
    })
}

fn add_exec(
    shim: &Shim,
    id: &str,
    exec: &str,
    terminal: bool,
    command: &[&str],
) -> ttrpc::Result<()> {
    let process =
        json!({ "args": command, "cwd": "/", "env": ["PATH=/bin"], "terminal": terminal });
    let spec = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
        value: process.to_string().into_bytes(),
        ..Any::default()
    };
    let request = api::ExecProcessRequest {
        id: id.into(),
        exec_id: exec.into(),
        terminal,
        spec: MessageField::some(spec),
        ..api::ExecProcessRequest::default()
    };
    shim.tasks.exec(shim.metadata(), &request).map(drop)
}

fn start_exec(shim: &Shim, id: &str, exec: &str) -> ttrpc::Result<u32> {
    let request = api::StartRequest {
        id: id.into(),
        exec_id: exec.into(),
        ..api::StartRequest::default()
    };
    shim.tasks
        .start(shim.metadata(), &request)
        .map(|response| response.pid)
}

fn delete_exec(shim: &Shim, id: &str, exec: &str) -> ttrpc::Result<u32> {
    let request = api::DeleteRequest {
        id: id.into(),
        exec_id: exec.into(),
        ..api::DeleteRequest::default()
    };
    shim.tasks
        .delete(shim.metadata(), &request)
        .map(|response| response.exit_status)
}

fn exits(listener: &Listener) -> Vec<Heard> {
    listener
        .heard()
        .into_iter()
        .filter(|event| event.topic == "exit")
        .collect()
}

fn nr_5_the_inits_exit_is_not_delayed_by_a_stream_of_execs(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = with_daemon(stage)?;
    let listener = Listener::listen(sandbox.directory())?;
    let bundle = heard_bundle(&sandbox, &listener, "c", &["sleep", "1000"])?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let (shim, stop) = (&shim, &stop);
            scope.spawn(move || {
                for number in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let exec = format!("e{worker}-{number}");
                    let _ = add_exec(shim, "c", &exec, false, &["true"]);
                    let _ = start_exec(shim, "c", &exec);
                    let _ = delete_exec(shim, "c", &exec);
                }
            });
        }
        let end = || -> anyhow::Result<()> {
            until("execs run", || Ok(exits(&listener).len() > 8))?;
            shim.kill("c", Signal::SIGKILL)?;
            ensure!(shim.wait("c")? == 137, "not 137");
            let is_published = || exits(&listener).iter().any(|exit| exit.exec.is_none());
            until("the init's exit is told", || Ok(is_published()))
        };
        let result = end();
        stop.store(true, Ordering::Relaxed);
        result
    })?;
    let exits = exits(&listener);
    let place = exits
        .iter()
        .position(|exit| exit.exec.is_none())
        .context("no exit of the init")?;
    ensure!(
        place + 1 == exits.len(),
        "exits after the init's: {:?}",
        exits.get(place..)
    );
    shim.delete("c")?;
    Ok(())
}

fn nr_6_an_init_that_dies_during_create_is_an_error_and_leaves_nothing(
    stage: &Stage,
) -> anyhow::Result<()> {
    let (sandbox, shim) = with_daemon(stage)?;
    let listener = Listener::listen(sandbox.directory())?;
    let before = Footprint::of(&sandbox);
    let bundle = heard_bundle(&sandbox, &listener, "c", &["sleep", "1000"])?;
    // The runtime tells its hooks the state of the container, with the init's pid.
    hook(
        &sandbox,
        &bundle,
        r#"kill -9 "$(sed 's/.*"pid":\([0-9]*\).*/\1/')"; sleep 0.1"#,
    )?;
    let error = shim.create("c", bundle.path()).unwrap_err().to_string();
    ensure!(error.contains("OCI runtime create failed"), "{error}");
    before.wait_for_return(&sandbox)?;
    ensure!(
        listener.heard().is_empty(),
        "events of a container that never was: {:?}",
        listener.heard()
    );
    ensure!(shim.state("c").is_err(), "it is still there");
    Ok(())
}

fn nr_7_a_long_create_blocks_nobody(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = with_daemon(stage)?;
    let other = Bundle::new(&sandbox, "other", &["sleep", "1000"])?;
    shim.create("other", other.path())?;
    let slow = Bundle::new(&sandbox, "slow", &["sleep", "1000"])?;
    let going = sandbox.directory().join("going");
    hook(
        &sandbox,
        &slow,
        &format!(
            "touch {0}; while [ -e {0} ]; do sleep 0.05; done",
            going.display()
        ),
    )?;
    std::thread::scope(|scope| {
        let creation = scope.spawn(|| shim.create("slow", slow.path()));
        let meanwhile = || -> anyhow::Result<()> {
            until("the hook runs", || Ok(going.exists()))?;
            let began = Instant::now();
            ensure!(
                shim.state("slow").is_err(),
                "a task that is not created yet has a state"
            );
            ensure!(shim.state("other")?.pid > 0, "no pid");
            shim.start("other")?;
            ensure!(
                began.elapsed() < Duration::from_secs(2),
                "it took {:?}",
                began.elapsed()
            );
            let connect = api::ConnectRequest {
                id: "slow".into(),
                ..api::ConnectRequest::default()
            };
            ensure!(
                shim.tasks.connect(shim.metadata(), &connect)?.task_pid == 0,
                "a pid before its time"
            );
            Ok(())
        };
        let result = meanwhile();
        fs::remove_file(&going)?;
        let created = creation
            .join()
            .map_err(|_| anyhow::anyhow!("create panicked"))?;
        result?;
        ensure!(created? > 0, "no pid");
        Ok(())
    })
}

fn nr_11_a_failed_exec_on_a_terminal_leaks_nothing(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = with_daemon(stage)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    let before = Footprint::of(&sandbox);
    for number in 0..5 {
        let exec = format!("e{number}");
        add_exec(&shim, "c", &exec, true, &["nonsense"])?;
        let error = start_exec(&shim, "c", &exec).unwrap_err().to_string();
        ensure!(error.contains("OCI runtime exec failed"), "{error}");
        delete_exec(&shim, "c", &exec)?;
    }
    before.wait_for_return(&sandbox)
}

fn nr_15_of_execs_with_the_same_id_one_wins(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = with_daemon(stage)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    let answers: Vec<ttrpc::Result<()>> = std::thread::scope(|scope| {
        let tries: Vec<_> = (0..16)
            .map(|_| scope.spawn(|| add_exec(&shim, "c", "same", false, &["true"])))
            .collect();
        tries
            .into_iter()
            .filter_map(|one| one.join().ok())
            .collect()
    });
    let won = answers.iter().filter(|answer| answer.is_ok()).count();
    let lost = answers
        .iter()
        .filter_map(|answer| answer.as_ref().err())
        .filter(|error| error.to_string().contains("id same: already exists"));
    ensure!((won, lost.count()) == (1, 15), "{answers:?}");
    Ok(())
}

fn nr_18_a_missing_command_is_an_error_and_no_exit(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = with_daemon(stage)?;
    let listener = Listener::listen(sandbox.directory())?;
    let bundle = heard_bundle(&sandbox, &listener, "missing", &["nonsense"])?;
    let error = shim
        .create("missing", bundle.path())
        .unwrap_err()
        .to_string();
    ensure!(error.contains("executable file not found"), "{error}");
    let bundle = heard_bundle(&sandbox, &listener, "c", &["sleep", "1000"])?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    add_exec(&shim, "c", "e", false, &["nonsense"])?;
    let error = start_exec(&shim, "c", "e").unwrap_err().to_string();
    ensure!(error.contains("executable file not found"), "{error}");
    delete_exec(&shim, "c", "e")?;
    shim.kill("c", Signal::SIGKILL)?;
    shim.wait("c")?;
    shim.delete("c")?;
    until("all is told", || {
        Ok(listener.heard().iter().any(|event| event.topic == "delete"))
    })?;
    let told: Vec<String> = listener
        .heard()
        .into_iter()
        .map(|event| event.topic)
        .collect();
    ensure!(
        told == ["create", "start", "exec-added", "exit", "delete"],
        "{told:?}"
    );
    Ok(())
}

fn the_streams_belong_to_io_gid(stage: &Stage) -> anyhow::Result<()> {
    use containerd_shim_protos::shim::oci::Options;
    use protobuf::Message;
    use std::os::unix::fs::MetadataExt;

    let (sandbox, shim) = with_daemon(stage)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let stdout = sandbox.directory().join("stdout");
    nix::unistd::mkfifo(&stdout, nix::sys::stat::Mode::S_IRWXU)?;
    let options = Options {
        io_uid: 1234,
        io_gid: 2345,
        ..Options::default()
    };
    let options = Any {
        type_url: "containerd.runc.v1.Options".into(),
        value: options.write_to_bytes()?,
        ..Any::default()
    };
    let request = api::CreateTaskRequest {
        id: "c".into(),
        bundle: bundle.path().to_string_lossy().into_owned(),
        stdout: stdout.to_string_lossy().into_owned(),
        options: MessageField::some(options),
        ..api::CreateTaskRequest::default()
    };
    let pid = shim.tasks.create(shim.metadata(), &request)?.pid;
    // runc's init gives its streams to the container's user afterwards, which is root here; the
    // group stays.
    let group = fs::metadata(format!("/proc/{pid}/fd/1"))?.gid();
    ensure!(group == 2345, "group {group}");
    Ok(())
}

fn nr_4_no_exec_is_started_after_the_inits_exit(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = with_daemon(stage)?;
    let before = Footprint::of(&sandbox);
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    add_exec(&shim, "c", "e", false, &["true"])?;
    shim.kill("c", Signal::SIGKILL)?;
    shim.wait("c")?;
    let error = start_exec(&shim, "c", "e").unwrap_err().to_string();
    ensure!(
        error.contains("container c init process is not running"),
        "{error}"
    );
    ensure!(delete_exec(&shim, "c", "e")? == 0, "it has a status");
    ensure!(shim.delete("c")? == 137, "the code was lost");
    before.wait_for_return(&sandbox)
}

/// containerd killed between the launcher's `start` and Create.
fn nr_21_what_was_started_and_never_created_is_gone_after_a_restart(
    stage: &Stage,
) -> anyhow::Result<()> {
    let mut sandbox = stage.sandbox()?;
    let pid = sandbox.detached(&[], "running", &["sleep", "1000"])?;
    sandbox.kill_containerd()?;
    let ghost = sandbox.bundle("ghost");
    let work = sandbox
        .directory()
        .join("root/io.containerd.runtime.v2.task")
        .join(sandbox.namespace())
        .join("ghost");
    fs::create_dir_all(&ghost)?;
    fs::create_dir_all(&work)?;
    std::os::unix::fs::symlink(&work, ghost.join("work"))?;
    fs::copy(
        sandbox.bundle("running").join("config.json"),
        ghost.join("config.json"),
    )?;
    let mut launcher = Command::new(stage.binary("containerd-shim-embed-v1"));
    launcher
        .args(["-namespace", sandbox.namespace(), "-address"])
        .arg(sandbox.directory().join("c.sock"))
        .args(["-id", "ghost", "start"])
        .env("EMBEDSHIM_STATE_DIR", sandbox.state_dir())
        .current_dir(&ghost);
    let finished = Running::capture(&mut launcher)?.finish(PATIENCE)?;
    ensure!(finished.code == Some(0), "{finished:?}");
    sandbox.start_containerd()?;
    until("the ghost is gone", || Ok(!ghost.exists()))?;
    let task = sandbox.task("running")?;
    ensure!(
        (task.pid, task.status.as_str()) == (pid, "RUNNING"),
        "{task:?}"
    );
    Ok(())
}

fn nr_24_a_shutdown_ends_neither_the_daemon_nor_a_task(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = with_daemon(stage)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    let daemon = sandbox.daemon_pid();
    for now in [false, true] {
        let request = api::ShutdownRequest {
            id: "c".into(),
            now,
            ..api::ShutdownRequest::default()
        };
        shim.tasks.shutdown(shim.metadata(), &request)?;
    }
    ensure!(
        shim.state("c")?.status() == api::Status::RUNNING,
        "it does not run"
    );
    ensure!(
        sandbox.daemon_pid() == daemon,
        "that is not the same daemon"
    );
    shim.kill("c", Signal::SIGKILL)?;
    ensure!(shim.wait("c")? == 137, "the code was lost");
    shim.delete("c")?;
    Ok(())
}

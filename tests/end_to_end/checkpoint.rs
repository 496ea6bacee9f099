//! Checkpoint and restore by CRIU.

use std::fs;
use std::path::Path;
use std::thread::scope;

use anyhow::ensure;
use containerd_shim_protos::api;
use containerd_shim_protos::shim::oci::CheckpointOptions;
use embedshim_tests::{
    Bundle, Footprint, Reader, Shim, Stage, Test, binary_name, ensure_counted, writer,
};
use nix::sys::signal::Signal;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::{Value, json};
use testbed::releases;
use testbed::sandbox::{Sandbox, until};

use crate::cut_short::{CutShort, When};
use crate::half_done::{SlowRuntime, fifo};
use crate::tests;

pub(crate) const TESTS: [Test; 8] = tests!(EmbedshimOnly:
    a_container_with_streams_goes_on_from_its_checkpoint,
    a_checkpoint_of_ctrs_is_restored_by_ctr,
    a_container_goes_on_from_its_checkpoint,
    a_checkpoint_to_the_end_that_outlives_its_daemon_is_answered_once_it_is_done,
    a_restore_that_cannot_be_watched_is_undone,
    a_restore_whose_runtime_was_killed_leaves_nothing_and_can_be_asked_again,
    a_task_that_is_to_be_restored_can_be_deleted,
    a_checkpoint_without_criu_is_refused_with_the_reason,
);

/// A sandbox in which runc finds a CRIU that works here, or none at all.
fn with_daemon(stage: &Stage, criu: bool) -> anyhow::Result<Sandbox> {
    let mut sandbox = stage.bare_sandbox()?;
    let usual = std::env::var("PATH")?;
    let without: Vec<&str> = usual
        .split(':')
        .filter(|entry| !Path::new(entry).join("criu").exists())
        .collect();
    let directory = sandbox.directory().join("path");
    fs::create_dir_all(&directory)?;
    if let Some(runc) = testbed::machine::find_on_path("runc") {
        std::os::unix::fs::symlink(fs::canonicalize(runc)?, directory.join("runc"))?;
    }
    let first = if criu {
        format!("{}:", releases::criu()?.display())
    } else {
        String::new()
    };
    sandbox.set_environment(
        "PATH",
        &format!("{first}{}:{}", directory.display(), without.join(":")),
    );
    let config = sandbox.directory().join("config.toml");
    fs::write(&config, "[monitor]\ncapacity = 1\n")?;
    sandbox.set_environment("EMBEDSHIM_CONFIG", &config.to_string_lossy());
    sandbox.start_daemon()?;
    Ok(sandbox)
}

/// A container that counts in a file of its rootfs, one line a step.
fn counting(sandbox: &Sandbox, id: &str) -> anyhow::Result<Bundle> {
    let script = "i=0; while :; do i=$((i+1)); echo $i >> /count; busybox usleep 20000; done";
    let bundle = Bundle::new(sandbox, id, &["sh", "-c", script])?;
    restorable(bundle)
}

/// CRIU makes a directory in the root, and locks a network namespace by iptables, which is not part
/// of what we test.
fn restorable(bundle: Bundle) -> anyhow::Result<Bundle> {
    bundle.edit(|spec| {
        if let Some(read_only) = spec.pointer_mut("/root/readonly") {
            *read_only = json!(false);
        }
        if let Some(namespaces) = spec
            .pointer_mut("/linux/namespaces")
            .and_then(Value::as_array_mut)
        {
            namespaces.retain(|namespace| {
                namespace.get("type").and_then(Value::as_str) != Some("network")
            });
        }
    })?;
    Ok(bundle)
}

fn lines(bundle: &Bundle) -> anyhow::Result<Vec<u64>> {
    let text = fs::read_to_string(bundle.path().join("rootfs/count")).unwrap_or_default();
    Ok(text.lines().map(str::parse).collect::<Result<_, _>>()?)
}

pub(crate) fn checkpoint(shim: &Shim, id: &str, image: &Path, exit: bool) -> ttrpc::Result<()> {
    let options = CheckpointOptions {
        exit,
        ..CheckpointOptions::default()
    };
    let options = Any {
        type_url: "containerd.runc.v1.CheckpointOptions".into(),
        value: options.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    };
    let request = api::CheckpointTaskRequest {
        id: id.into(),
        path: image.to_string_lossy().into_owned(),
        // None at all is allowed, too (containerd 18d7e84f9).
        options: MessageField(exit.then(|| Box::new(options))),
        ..api::CheckpointTaskRequest::default()
    };
    shim.tasks.checkpoint(shim.metadata(), &request).map(drop)
}

/// All the way through containerd: it keeps the image in its content store and unpacks it again.
fn a_checkpoint_of_ctrs_is_restored_by_ctr(stage: &Stage) -> anyhow::Result<()> {
    let mut sandbox = with_daemon(stage, true)?;
    sandbox.start_containerd()?;
    sandbox.import(stage.archive())?;
    let script = "i=0; while :; do i=$((i+1)); echo $i >> /count; busybox usleep 20000; done";
    let command = ["sh", "-c", script];
    sandbox.detached(&["--net-host"], "c", &command)?;
    let counted = |id: &str| {
        let text = fs::read_to_string(sandbox.bundle(id).join("rootfs/count")).unwrap_or_default();
        text.lines().count()
    };
    until("it counts", || Ok(counted("c") > 5))?;
    let save = [
        "container",
        "checkpoint",
        "--task",
        "--rw",
        "--image",
        "c",
        "saved:1",
    ];
    sandbox.ctr_ok(&save)?;
    let at_least = counted("c");
    sandbox.ctr_ok(&["task", "kill", "--signal", "KILL", "c"])?;
    sandbox.wait_for_status("c", "STOPPED")?;
    sandbox.delete_task("c")?;
    sandbox.ctr_ok(&["container", "restore", "--live", "again", "saved:1"])?;
    until("it goes on", || Ok(counted("again") > at_least + 5))?;
    sandbox.ctr_ok(&["task", "kill", "--signal", "KILL", "again"])?;
    sandbox.wait_for_status("again", "STOPPED")?;
    ensure!(sandbox.delete_task("again")? == 137, "the code was lost");
    Ok(())
}

fn a_container_goes_on_from_its_checkpoint(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = with_daemon(stage, true)?;
    let shim = Shim::connect(&sandbox)?;
    let before = Footprint::of(&sandbox);
    let bundle = counting(&sandbox, "c")?;
    let image = sandbox.directory().join("image");
    shim.create("c", bundle.path())?;
    let error = checkpoint(&shim, "c", &image, true)
        .unwrap_err()
        .to_string();
    ensure!(
        error.contains("cannot checkpoint a task in created state"),
        "{error}"
    );
    shim.start("c")?;
    until("it counts", || Ok(lines(&bundle)?.len() > 5))?;
    // Once while it goes on, and once to its end.
    checkpoint(&shim, "c", &sandbox.directory().join("first"), false)?;
    let counted = lines(&bundle)?.len();
    until("it goes on", || Ok(lines(&bundle)?.len() > counted + 2))?;
    checkpoint(&shim, "c", &image, true)?;
    ensure!(
        shim.wait("c")? == 137 && shim.delete("c")? == 137,
        "it did not end"
    );
    let counted = lines(&bundle)?;
    let request = api::CreateTaskRequest {
        id: "c".into(),
        bundle: bundle.path().to_string_lossy().into_owned(),
        checkpoint: image.to_string_lossy().into_owned(),
        ..api::CreateTaskRequest::default()
    };
    let pid = shim.tasks.create(shim.metadata(), &request)?.pid;
    ensure!(
        pid == 0 && lines(&bundle)? == counted,
        "it runs before its start"
    );
    let pid = shim.start("c")?;
    ensure!(pid > 0 && shim.state("c")?.pid == pid, "no pid");
    until("it goes on counting", || {
        Ok(lines(&bundle)?.len() > counted.len() + 5)
    })?;
    // From where it was: every number once.
    let all = lines(&bundle)?;
    ensure!(all.iter().copied().eq(1..=all.len() as u64), "{all:?}");
    let kill = api::KillRequest {
        id: "c".into(),
        signal: 9,
        ..api::KillRequest::default()
    };
    shim.tasks.kill(shim.metadata(), &kill)?;
    ensure!(
        shim.wait("c")? == 137 && shim.delete("c")? == 137,
        "the code was lost"
    );
    before.wait_for_return(&sandbox)
}

/// Its streams are pipes, which CRIU knows; the restored container has those of its new client.
fn a_container_with_streams_goes_on_from_its_checkpoint(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = with_daemon(stage, true)?;
    let shim = Shim::connect(&sandbox)?;
    let before = Footprint::of(&sandbox);
    let script = "i=0; while :; do i=$((i+1)); echo line $i; busybox usleep 20000; done";
    let bundle = restorable(Bundle::new(&sandbox, "c", &["sh", "-c", script])?)?;
    let image = sandbox.directory().join("image");
    let mut first = Streams::new(&sandbox, "first")?;
    shim.create_with("c", bundle.path(), |request| first.put_into(request))?;
    shim.start("c")?;
    first.stdout.wait_for("line 5\n")?;
    checkpoint(&shim, "c", &sandbox.directory().join("other"), false)?;
    let so_far = first.stdout.text().lines().count();
    first.stdout.wait_for(&format!("line {}\n", so_far + 5))?;
    checkpoint(&shim, "c", &image, true)?;
    ensure!(
        shim.wait("c")? == 137 && shim.delete("c")? == 137,
        "it did not end"
    );
    let told = first.stdout.finish()?;
    let last = told.lines().count();
    ensure_counted(&told, "line", last)?;
    let mut second = Streams::new(&sandbox, "second")?;
    shim.create_with("c", bundle.path(), |request| {
        request.checkpoint = image.to_string_lossy().into_owned();
        second.put_into(request);
    })?;
    shim.start("c")?;
    second.stdout.wait_for(&format!("line {}\n", last + 5))?;
    shim.kill("c", Signal::SIGKILL)?;
    ensure!(
        shim.wait("c")? == 137 && shim.delete("c")? == 137,
        "the code was lost"
    );
    let all = format!("{told}{}", second.stdout.finish()?);
    ensure_counted(&all, "line", all.lines().count())?;
    before.wait_for_return(&sandbox)
}

/// Its client does not read, so the exit is published half a second after the process has ended:
/// the request that comes again must not be refused meanwhile.
fn a_checkpoint_to_the_end_that_outlives_its_daemon_is_answered_once_it_is_done(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = with_daemon(stage, true)?;
    let shim = Shim::connect(&sandbox)?;
    let before = Footprint::of(&sandbox);
    let script = "seq 1 100000; sleep 1000";
    let bundle = restorable(Bundle::new(&sandbox, "c", &["sh", "-c", script])?)?;
    let runtime = SlowRuntime::new(&sandbox, "checkpoint", true)?;
    let stdout = fifo(&sandbox, "out")?;
    let client = fs::File::options().read(true).write(true).open(&stdout)?;
    shim.create_with("c", bundle.path(), |request| {
        runtime.choose(request);
        request.stdout = stdout.to_string_lossy().into_owned();
    })?;
    shim.start("c")?;
    let image = sandbox.directory().join("image");
    scope(|scope| runtime.kill_within(scope.spawn(|| checkpoint(&shim, "c", &image, true))))??;
    ensure!(
        shim.wait("c")? == 137 && shim.delete("c")? == 137,
        "it did not end"
    );
    drop(client);
    before.wait_for_return(&sandbox)
}

/// All three streams of a client.
struct Streams {
    stdin: std::path::PathBuf,
    _input: fs::File,
    stdout: Reader,
    stderr: Reader,
}

impl Streams {
    fn new(sandbox: &Sandbox, name: &str) -> anyhow::Result<Self> {
        let (stdin, input) = writer(sandbox, &format!("{name}-in"))?;
        Ok(Self {
            stdin,
            _input: input,
            stdout: Reader::new(sandbox, &format!("{name}-out"))?,
            stderr: Reader::new(sandbox, &format!("{name}-err"))?,
        })
    }

    fn put_into(&self, request: &mut api::CreateTaskRequest) {
        request.stdin = self.stdin.to_string_lossy().into_owned();
        request.stdout = self.stdout.path();
        request.stderr = self.stderr.path();
    }
}

fn a_restore_that_cannot_be_watched_is_undone(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = with_daemon(stage, true)?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = counting(&sandbox, "c")?;
    let image = sandbox.directory().join("image");
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    checkpoint(&shim, "c", &image, true)?;
    ensure!(
        shim.wait("c")? == 137 && shim.delete("c")? == 137,
        "it did not end"
    );
    // The table has one place, and this is it.
    let other = counting(&sandbox, "other")?;
    shim.create("other", other.path())?;
    let before = Footprint::of(&sandbox);
    let request = api::CreateTaskRequest {
        id: "c".into(),
        bundle: bundle.path().to_string_lossy().into_owned(),
        checkpoint: image.to_string_lossy().into_owned(),
        ..api::CreateTaskRequest::default()
    };
    shim.tasks.create(shim.metadata(), &request)?;
    let error = shim.start("c").unwrap_err().to_string();
    ensure!(error.contains("table is full"), "{error}");
    ensure!(shim.state("c")?.pid == 0, "a pid without a process");
    shim.delete("c")?;
    before.wait_for_return(&sandbox)
}

/// runc mounts the root once more for CRIU, in its own state directory.
fn a_restore_whose_runtime_was_killed_leaves_nothing_and_can_be_asked_again(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = with_daemon(stage, true)?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = counting(&sandbox, "c")?;
    let known = Path::new("/run/containerd/runc")
        .join(sandbox.namespace())
        .join("c");
    let mount = format!(
        "mkdir -p {0}/criu-root; mount --bind {1} {0}/criu-root",
        known.display(),
        bundle.path().join("rootfs").display()
    );
    let runtime = CutShort::new(&sandbox, "restore", When::Before, &mount)?;
    let before = Footprint::of(&sandbox);
    let image = sandbox.directory().join("image");
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    until("it counts", || Ok(lines(&bundle)?.len() > 5))?;
    checkpoint(&shim, "c", &image, true)?;
    ensure!(
        shim.wait("c")? == 137 && shim.delete("c")? == 137,
        "it did not end"
    );
    let counted = lines(&bundle)?.len();
    shim.create_with("c", bundle.path(), |request| {
        request.checkpoint = image.to_string_lossy().into_owned();
        request.options = binary_name(&runtime.program);
    })?;
    runtime.arm()?;
    let error = shim.start("c").unwrap_err().to_string();
    ensure!(error.contains("OCI runtime restore failed"), "{error}");
    runtime.check_killed()?;
    ensure!(!known.exists(), "{} is left", known.display());
    shim.start("c")?;
    until("it goes on", || Ok(lines(&bundle)?.len() > counted + 5))?;
    shim.kill("c", Signal::SIGKILL)?;
    ensure!(
        shim.wait("c")? == 137 && shim.delete("c")? == 137,
        "the code was lost"
    );
    before.wait_for_return(&sandbox)
}

fn a_task_that_is_to_be_restored_can_be_deleted(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = with_daemon(stage, false)?;
    let shim = Shim::connect(&sandbox)?;
    let before = Footprint::of(&sandbox);
    let bundle = counting(&sandbox, "c")?;
    let create = |image: &Path| {
        let request = api::CreateTaskRequest {
            id: "c".into(),
            bundle: bundle.path().to_string_lossy().into_owned(),
            checkpoint: image.to_string_lossy().into_owned(),
            ..api::CreateTaskRequest::default()
        };
        shim.tasks.create(shim.metadata(), &request)
    };
    let empty = sandbox.directory().join("empty");
    let error = create(&empty).unwrap_err().to_string();
    ensure!(
        error.contains("is not a directory") && error.contains("empty"),
        "{error}"
    );
    before.wait_for_return(&sandbox)?;
    fs::create_dir(&empty)?;
    create(&empty)?;
    let exec = api::ExecProcessRequest {
        id: "c".into(),
        exec_id: "e".into(),
        ..Default::default()
    };
    let error = shim
        .tasks
        .exec(shim.metadata(), &exec)
        .unwrap_err()
        .to_string();
    ensure!(!error.is_empty(), "an exec in what does not exist");
    let error = shim.start("c").unwrap_err().to_string();
    ensure!(error.contains("OCI runtime restore failed"), "{error}");
    ensure!(shim.state("c")?.pid == 0, "a pid without a process");
    shim.delete("c")?;
    before.wait_for_return(&sandbox)
}

fn a_checkpoint_without_criu_is_refused_with_the_reason(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = with_daemon(stage, false)?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = counting(&sandbox, "c")?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    let error = checkpoint(&shim, "c", &sandbox.directory().join("image"), true)
        .unwrap_err()
        .to_string();
    ensure!(
        error.contains("OCI runtime checkpoint failed") && error.contains("criu"),
        "{error}"
    );
    let error = checkpoint(&shim, "c", Path::new("relative"), true)
        .unwrap_err()
        .to_string();
    ensure!(error.contains("not an absolute path"), "{error}");
    ensure!(
        shim.state("c")?.status == api::Status::RUNNING.into(),
        "it does not run any more"
    );
    Ok(())
}

//! One container's whole life without containerd, by each OCI runtime, on whichever cgroup version
//! is here, and a pod's with our init process: small enough for a guest with an old kernel
//! (`cargo xtask test-matrix`).

use std::fs;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use containerd_shim_protos::api;
use containerd_shim_protos::cgroups::metrics::Metrics;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::shim::oci::Options;
use embedshim_tests::{Bundle, Controller, Footprint, Listener, Shim, Stage, Test};
use nix::sys::signal::Signal;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::{Value, json};
use shim_api::bundle::BundleNote;
use testbed::sandbox::{Sandbox, until};

use crate::tests;

pub(crate) const TESTS: [Test; 2] =
    tests!(EmbedshimOnly: a_life_with_runc, a_life_in_a_pod_with_our_init);
/// Debian's crun refuses a machine with both versions.
pub(crate) const UNIFIED: [Test; 1] = tests!(UnifiedCgroups: a_life_with_crun);

fn a_life_with_runc(stage: &Stage) -> anyhow::Result<()> {
    life(stage, "runc")
}

fn a_life_with_crun(stage: &Stage) -> anyhow::Result<()> {
    life(stage, "crun")
}

fn life(stage: &Stage, runtime: &str) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let listener = Listener::listen(sandbox.directory())?;
    let mut shim = Shim::connect(&sandbox)?;
    let before = Footprint::of(&sandbox);
    let actor = Actor {
        sandbox: &sandbox,
        listener: &listener,
        runtime,
    };
    // An exact code, an exec, statistics, a pause.
    actor.start(&shim, "c", "sleep 1000", |_| {})?;
    ensure!(exec(&shim, "c", "echo x; exit 5")? == 5, "the exec's code");
    let (memory, processes) = usage(&shim, "c")?;
    ensure!(
        memory > 0 && processes == 1,
        "{memory} bytes, {processes} processes"
    );
    let (id, metadata) = ("c".to_owned(), shim.metadata());
    let pause = api::PauseRequest {
        id: id.clone(),
        ..api::PauseRequest::default()
    };
    shim.tasks.pause(metadata.clone(), &pause)?;
    ensure!(
        shim.state("c")?.status() == api::Status::PAUSED,
        "not paused"
    );
    let resume = api::ResumeRequest {
        id,
        ..api::ResumeRequest::default()
    };
    shim.tasks.resume(metadata, &resume)?;
    shim.kill("c", Signal::SIGKILL)?;
    ensure!(
        shim.wait("c")? == 137 && shim.delete("c")? == 137,
        "not 137"
    );
    // Out of memory: told before the exit, and counted afterwards.
    actor.start(&shim, "oom", "exec busybox tail /dev/zero", |spec| {
        if let Some(resources) = spec.pointer_mut("/linux/resources") {
            let limit = 16 << 20;
            // Without swap, where that is counted.
            *resources = json!({"memory": {"limit": limit, "swap": limit}});
        }
    })?;
    ensure!(shim.wait("oom")? == 137, "not killed");
    until("both events came", || {
        Ok(position(&listener, "oom", "exit").is_some())
    })?;
    let (oom, exit) = (
        position(&listener, "oom", "oom"),
        position(&listener, "oom", "exit"),
    );
    ensure!(oom.is_some() && oom < exit, "{:?}", listener.heard());
    shim.delete("oom")?;
    // An exit while no daemon is there.
    let pid = actor.start(
        &shim,
        "late",
        "trap 'exit 9' TERM; echo > /ready; while :; do sleep 0.05; done",
        |spec| {
            if let Some(read_only) = spec.pointer_mut("/root/readonly") {
                *read_only = false.into();
            }
        },
    )?;
    let ready = actor.bundle("late").join("rootfs/ready");
    until("its trap is set", || Ok(ready.exists()))?;
    sandbox.end_daemon(Signal::SIGKILL)?;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid)?);
    nix::sys::signal::kill(pid, Signal::SIGTERM)?;
    until("it has ended", || {
        Ok(!testbed::sandbox::is_alive(pid.as_raw()))
    })?;
    sandbox.start_daemon()?;
    shim = Shim::connect(&sandbox)?;
    ensure!(
        shim.wait("late")? == 9 && shim.delete("late")? == 9,
        "not 9"
    );
    before.wait_for_return(&sandbox)
}

/// The init process is machine code that embedshim has for each processor: it gives up everything,
/// reaps what its container leaves, is there for the next daemon, and cannot be ended from inside.
fn a_life_in_a_pod_with_our_init(stage: &Stage) -> anyhow::Result<()> {
    let mut sandbox = stage.bare_sandbox()?;
    let listener = Listener::listen(sandbox.directory())?;
    let config = pods_config(sandbox.directory(), listener.path())?;
    sandbox.set_environment("EMBEDSHIM_CONFIG", &config);
    sandbox.start_daemon()?;
    let socket = sandbox.state_dir().join("pods.sock");
    let mut pods = Controller::connect_as(&socket, sandbox.namespace())?;
    // Without a parent its cgroup is the machine's: no other test has one of that name.
    let [first, pod] = ["first", "pod"].map(|id| format!("{}-{id}", sandbox.namespace()));
    // What the first pod leaves for all others is not a leftover.
    let init = begin_pod(&sandbox, &mut pods, &first)?;
    end_pod(&mut pods, &first, init)?;
    let before = Footprint::of(&sandbox);
    let init = begin_pod(&sandbox, &mut pods, &pod)?;
    until("the init has given up everything", || has_nothing(init))?;
    // Its child is the init's when it has ended.
    let script = "(sleep 0.1 &); exec sleep 1000";
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", script])?;
    bundle.edit(|spec| join(&pod, spec))?;
    fs::write(bundle.path().join("sandbox"), &pod)?;
    let shim = Shim::connect(&sandbox)?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    ensure!(
        exec(&shim, "c", "kill -KILL 1; kill -TERM 1; exit 5")? == 5,
        "the exec's code"
    );
    let children = format!("/proc/{init}/task/{init}/children");
    until("the orphan is reaped", || {
        Ok(fs::read_to_string(&children)?.trim().is_empty())
    })?;
    sandbox.kill_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    ensure!(testbed::sandbox::is_alive(init), "the init is dead");
    shim.kill("c", Signal::SIGKILL)?;
    ensure!(
        shim.wait("c")? == 137 && shim.delete("c")? == 137,
        "not 137"
    );
    let mut pods = Controller::connect_as(&socket, sandbox.namespace())?;
    end_pod(&mut pods, &pod, init)?;
    before.wait_for_return(&sandbox)
}

/// Writes a configuration with pods of our controller and returns its path.
fn pods_config(directory: &Path, events: &Path) -> anyhow::Result<String> {
    for part in ["cri/root", "cri/state"] {
        fs::create_dir_all(directory.join(part))?;
    }
    let (shown, events) = (directory.display(), events.display());
    let text = format!(
        "[sandbox]\nenabled = true\ncri_root = \"{shown}/cri/root\"\n\
         cri_state = \"{shown}/cri/state\"\ncontainerd = \"{shown}/c.sock\"\n\
         events = \"{events}\"\n"
    );
    let path = format!("{shown}/embedshim.toml");
    fs::write(&path, text)?;
    Ok(path)
}

/// Creates and starts a pod whose containers share their processes; returns its init's pid.
fn begin_pod(sandbox: &Sandbox, pods: &mut Controller, id: &str) -> anyhow::Result<i32> {
    let refused = pods.create_plain(id, true);
    ensure!(refused.is_none(), "Create: {refused:?}");
    pods.start(id)?;
    let name = format!("sandboxes/{}:{id}.json", sandbox.namespace());
    let record = fs::read_to_string(sandbox.state_dir().join(name))?;
    let record: Value = serde_json::from_str(&record)?;
    let pid = record.pointer("/init/identity/pid").and_then(Value::as_i64);
    Ok(i32::try_from(pid.context("no init")?)?)
}

/// Whether it has neither rights nor descriptors and its filter: the last of them comes some
/// instructions after it has become the program.
fn has_nothing(init: i32) -> anyhow::Result<bool> {
    let status = fs::read_to_string(format!("/proc/{init}/status"))?;
    let has = |line| status.lines().any(|found| found == line);
    let descriptors = fs::read_dir(format!("/proc/{init}/fd"))?.count();
    let lines = [
        "Name:\tembedshim-pod",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ];
    Ok(descriptors == 0 && lines.into_iter().all(has))
}

fn end_pod(pods: &mut Controller, id: &str, init: i32) -> anyhow::Result<()> {
    for method in ["Stop", "Shutdown"] {
        pods.ask(method, id)?;
    }
    ensure!(!testbed::sandbox::is_alive(init), "the init lives on");
    Ok(())
}

/// Puts a container into a pod, as the CRI plugin does with one of a sandbox controller.
fn join(pod: &str, spec: &mut Value) {
    let namespaces = spec.pointer_mut("/linux/namespaces");
    for namespace in namespaces
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        let file = match namespace.get("type").and_then(Value::as_str) {
            Some("network") => "net",
            Some(shared @ ("ipc" | "uts" | "pid")) => shared,
            _ => continue,
        }
        .to_owned();
        if let Some(namespace) = namespace.as_object_mut() {
            namespace.insert("path".into(), json!(format!("/proc/0/ns/{file}")));
        }
    }
    if let Some(spec) = spec.as_object_mut() {
        let annotations = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": pod,
        });
        spec.insert("annotations".into(), annotations);
        // The pod has a name.
        spec.remove("hostname");
    }
}

fn position(listener: &Listener, container: &str, topic: &str) -> Option<usize> {
    let heard = listener.heard();
    heard
        .iter()
        .position(|event| event.container == container && event.topic == topic)
}

struct Actor<'a> {
    sandbox: &'a Sandbox,
    listener: &'a Listener,
    runtime: &'a str,
}

impl Actor<'_> {
    fn bundle(&self, id: &str) -> std::path::PathBuf {
        self.sandbox.directory().join("bundles").join(id)
    }

    fn start(
        &self,
        shim: &Shim,
        id: &str,
        script: &str,
        edit: impl FnOnce(&mut Value),
    ) -> anyhow::Result<u32> {
        let bundle = Bundle::new(self.sandbox, id, &["sh", "-c", script])?;
        bundle.edit(edit)?;
        let note = BundleNote {
            events: self.listener.path().display().to_string(),
            ..BundleNote::default()
        };
        note.write(bundle.path())?;
        let options = Options {
            binary_name: self.runtime.into(),
            ..Options::default()
        };
        let options = Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: options.write_to_bytes()?,
            ..Any::default()
        };
        shim.create_with(id, bundle.path(), |request| {
            request.options = MessageField::some(options);
        })?;
        Ok(shim.start(id)?)
    }
}

/// Runs a command and returns its code.
fn exec(shim: &Shim, id: &str, script: &str) -> anyhow::Result<u32> {
    let process = json!({"args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"]});
    let spec = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
        value: process.to_string().into_bytes(),
        ..Any::default()
    };
    let (id, exec_id) = (id.to_owned(), "e".to_owned());
    let add = api::ExecProcessRequest {
        id: id.clone(),
        exec_id: exec_id.clone(),
        spec: MessageField::some(spec),
        ..api::ExecProcessRequest::default()
    };
    let start = api::StartRequest {
        id: id.clone(),
        exec_id: exec_id.clone(),
        ..api::StartRequest::default()
    };
    let wait = api::WaitRequest {
        id: id.clone(),
        exec_id: exec_id.clone(),
        ..api::WaitRequest::default()
    };
    let delete = api::DeleteRequest {
        id,
        exec_id,
        ..api::DeleteRequest::default()
    };
    shim.tasks.exec(shim.metadata(), &add)?;
    shim.tasks.start(shim.metadata(), &start)?;
    let code = shim.tasks.wait(shim.metadata(), &wait)?.exit_status;
    shim.tasks.delete(shim.metadata(), &delete)?;
    Ok(code)
}

/// Memory in bytes and the number of processes, by the metrics of either version.
fn usage(shim: &Shim, id: &str) -> anyhow::Result<(u64, u64)> {
    let request = api::StatsRequest {
        id: id.into(),
        ..api::StatsRequest::default()
    };
    let answer = shim.tasks.stats(shim.metadata(), &request)?;
    let stats = answer.stats.unwrap_or_default();
    match stats.type_url.as_str() {
        "io.containerd.cgroups.v2.Metrics" => {
            let metrics = v2::Metrics::parse_from_bytes(&stats.value)?;
            Ok((metrics.memory.usage, metrics.pids.current))
        }
        "io.containerd.cgroups.v1.Metrics" => {
            let metrics = Metrics::parse_from_bytes(&stats.value)?;
            Ok((metrics.memory.usage.usage, metrics.pids.current))
        }
        other => bail!("metrics of type {other}"),
    }
}

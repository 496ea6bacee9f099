//! Kill, pause, resume, ps, metrics.

use std::fs;
use std::path::PathBuf;
use std::thread::{scope, sleep};
use std::time::Duration;

use anyhow::{Context, ensure};
use containerd_shim_protos::api;
use containerd_shim_protos::cgroups::metrics::Metrics;
use containerd_shim_protos::cgroups_v2::metrics::Metrics as MetricsV2;
use embedshim_tests::{Bundle, Footprint, Shim, Stage, Test};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::{Value, json};
use testbed::sandbox::{PATIENCE, Running, Sandbox, is_alive, until};

use crate::tests;

pub(crate) const TESTS: [Test; 7] = tests!(AnyRuntime:
    a_signal_reaches_the_init,
    a_paused_container_is_frozen_until_resumed,
    what_the_state_does_not_allow_is_refused_in_runc_v2s_words,
    ps_lists_execs_by_name,
    metrics_count_processes_and_memory,
    a_running_task_is_not_deleted,
    sigkill_ends_a_container_that_something_else_froze,
);

pub(crate) const OURS: [Test; 6] = tests!(EmbedshimOnly:
    the_counters_of_a_stopped_container_are_told,
    an_update_changes_the_limit,
    a_stopped_task_still_tells_that_it_ran_out_of_memory,
    kills_of_a_paused_container_at_the_same_time_are_each_answered,
    sigkill_ends_an_exec_of_a_paused_container_which_stays_paused,
    statistics_that_take_long_are_waited_for_and_not_denied,
);

fn a_signal_reaches_the_init(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let mut run =
        Running::capture(&mut sandbox.run(&["--rm"], "c", &["guest", "until-term", "33"]))?;
    sandbox.wait_for_status("c", "RUNNING")?;
    // Until its handler is there the signal has no effect, so again until it has.
    until("it ends", || {
        let _ = sandbox
            .ctr(["task", "kill", "--signal", "TERM", "c"])
            .output()?;
        run.has_ended()
    })?;
    let finished = run.finish(PATIENCE)?;
    ensure!(finished.code == Some(33), "{finished:?}");
    Ok(())
}

fn a_paused_container_is_frozen_until_resumed(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&[], "c", &["sleep", "1000"])?;
    sandbox.ctr_ok(&["task", "pause", "c"])?;
    ensure!(
        sandbox.task("c")?.status == "PAUSED",
        "{:?}",
        sandbox.task("c")?
    );
    let refused = sandbox
        .ctr_ok(&["task", "exec", "--exec-id", "e", "c", "true"])
        .unwrap_err();
    ensure!(
        refused
            .to_string()
            .contains("cannot exec in a paused state"),
        "{refused}"
    );
    sandbox.ctr_ok(&["task", "resume", "c"])?;
    ensure!(
        sandbox.task("c")?.status == "RUNNING",
        "{:?}",
        sandbox.task("c")?
    );
    sandbox
        .ctr_ok(&["task", "exec", "--exec-id", "f", "c", "true"])
        .map(drop)
}

fn what_the_state_does_not_allow_is_refused_in_runc_v2s_words(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&[], "c", &["true"])?;
    sandbox.wait_for_status("c", "STOPPED")?;
    let refusals = [
        (
            ["task", "pause", "c"].as_slice(),
            "cannot pause a stopped container",
        ),
        (
            &["task", "resume", "c"],
            "cannot resume a stopped container",
        ),
        (
            &["task", "exec", "--exec-id", "e", "c", "true"],
            "cannot exec in a stopped state",
        ),
        (
            &["task", "kill", "--signal", "KILL", "c"],
            "process already finished",
        ),
    ];
    for (arguments, words) in refusals {
        let refused = sandbox.ctr_ok(arguments).unwrap_err().to_string();
        ensure!(refused.contains(words), "{arguments:?}: {refused}");
    }
    Ok(())
}

fn ps_lists_execs_by_name(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let pid = sandbox.detached(&[], "c", &["sleep", "1000"])?;
    sandbox.ctr_ok(&[
        "task",
        "exec",
        "--detach",
        "--exec-id",
        "named",
        "c",
        "sleep",
        "1000",
    ])?;
    let list = sandbox.ctr_ok(&["task", "ps", "c"])?;
    ensure!(
        list.contains(&pid.to_string()) && list.contains("named"),
        "{list}"
    );
    Ok(())
}

fn metrics_count_processes_and_memory(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&[], "c", &["sleep", "1000"])?;
    let text = sandbox.ctr_ok(&["task", "metrics", "--format", "json", "c"])?;
    let metrics: Value = serde_json::from_str(&text)?;
    let number = |paths: [&str; 2]| {
        paths
            .iter()
            .find_map(|path| metrics.pointer(path)?.as_u64())
            .unwrap_or(0)
    };
    ensure!(number(["/pids/current", "/Pids/Current"]) == 1, "{text}");
    ensure!(
        number(["/memory/usage/usage", "/memory/usage"]) > 0,
        "{text}"
    );
    ensure!(
        number(["/cpu/usage/total", "/cpu/usage_usec"]) > 0,
        "{text}"
    );
    Ok(())
}

fn a_running_task_is_not_deleted(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&[], "c", &["sleep", "1000"])?;
    ensure!(
        sandbox.delete_task("c").is_err(),
        "a running task was deleted"
    );
    ensure!(
        sandbox.task("c")?.status == "RUNNING",
        "it does not run any more"
    );
    Ok(())
}

/// Its cgroup is there until it is deleted, so nothing is read of it before the exit is told.
fn the_counters_of_a_stopped_container_are_told(stage: &Stage) -> anyhow::Result<()> {
    const LIMIT: u64 = 64 << 20;
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["true"])?;
    bundle.edit(|spec| spec["linux"]["resources"]["memory"] = json!({ "limit": LIMIT }))?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    ensure!(shim.wait("c")? == 0, "not 0");
    ensure!(
        memory(&shim, "c")? == (LIMIT, 0),
        "{:?}",
        memory(&shim, "c")?
    );
    sandbox.kill_daemon()?;
    ensure!(
        memory(&shim, "c")? == (LIMIT, 0),
        "{:?}",
        memory(&shim, "c")?
    );
    ensure!(shim.delete("c")? == 0, "not 0");
    Ok(())
}

/// The statistics of a task, as v1 or v2: the memory limit and the OOM kills.
fn memory(shim: &Shim, id: &str) -> anyhow::Result<(u64, u64)> {
    let request = api::StatsRequest {
        id: id.into(),
        ..api::StatsRequest::default()
    };
    let stats = shim
        .tasks
        .stats(shim.metadata(), &request)?
        .stats
        .unwrap_or_default();
    if stats.type_url == "io.containerd.cgroups.v2.Metrics" {
        let metrics = MetricsV2::parse_from_bytes(&stats.value)?;
        return Ok((metrics.memory.usage_limit, metrics.memory_events.oom_kill));
    }
    ensure!(
        stats.type_url == "io.containerd.cgroups.v1.Metrics",
        "{}",
        stats.type_url
    );
    let metrics = Metrics::parse_from_bytes(&stats.value)?;
    Ok((
        metrics.memory.usage.limit,
        metrics.memory_oom_control.oom_kill,
    ))
}

fn an_update_changes_the_limit(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    let update = |json: &str| {
        let resources = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
            value: json.into(),
            ..Any::default()
        };
        let request = api::UpdateTaskRequest {
            id: "c".into(),
            resources: MessageField::some(resources),
            ..Default::default()
        };
        shim.tasks.update(shim.metadata(), &request)
    };
    update(r#"{"memory":{"limit":67108864}}"#)?;
    ensure!(
        memory(&shim, "c")?.0 == 64 << 20,
        "{:?}",
        memory(&shim, "c")?
    );
    let error = update("{ not json").unwrap_err().to_string();
    ensure!(error.contains("OCI runtime update failed"), "{error}");
    Ok(())
}

fn a_stopped_task_still_tells_that_it_ran_out_of_memory(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    // The shell's own memory grows until the limit is met.
    let bundle = Bundle::new(
        &sandbox,
        "c",
        &["sh", "-c", "a=x; while :; do a=$a$a; done"],
    )?;
    bundle.edit(|spec| {
        if let Some(linux) = spec.pointer_mut("/linux").and_then(Value::as_object_mut) {
            linux.insert(
                "resources".into(),
                serde_json::json!({ "memory": { "limit": 16 << 20, "swap": 16 << 20 } }),
            );
        }
    })?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    let code = shim.wait("c")?;
    ensure!(code == 137, "{code}");
    let (_, kills) = memory(&shim, "c")?;
    ensure!(kills >= 1, "{kills} OOM kills");
    shim.delete("c")?;
    Ok(())
}

/// The cgroup of a process, frozen by hand; thawed at the end, whatever happens.
struct Frozen {
    file: PathBuf,
    is_unified: bool,
}

impl Frozen {
    fn new(pid: u32) -> anyhow::Result<Self> {
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let path_of = |prefix: &str| {
            let mut lines = cgroups.lines().filter_map(|line| line.split_once(':'));
            lines.find_map(|(_, rest)| rest.strip_prefix(prefix)?.strip_prefix('/'))
        };
        let frozen = if let Some(path) = path_of("freezer:") {
            let directory = PathBuf::from("/sys/fs/cgroup/freezer").join(path);
            fs::write(directory.join("freezer.state"), "FROZEN")?;
            Self {
                file: directory.join("freezer.state"),
                is_unified: false,
            }
        } else {
            let path = path_of(":").context("in no cgroup")?;
            let directory = PathBuf::from("/sys/fs/cgroup").join(path);
            fs::write(directory.join("cgroup.freeze"), "1")?;
            Self {
                file: directory.join("cgroup.freeze"),
                is_unified: true,
            }
        };
        until("it is frozen", || frozen.is_frozen())?;
        Ok(frozen)
    }

    fn is_frozen(&self) -> anyhow::Result<bool> {
        let state = fs::read_to_string(&self.file)?;
        Ok(matches!(state.trim(), "FROZEN" | "1"))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let thawed = if self.is_unified { "0" } else { "THAWED" };
        let _ = fs::write(&self.file, thawed);
    }
}

fn sigkill_ends_a_container_that_something_else_froze(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let pid = sandbox.detached(&[], "c", &["sleep", "1000"])?;
    let _frozen = Frozen::new(pid.unsigned_abs())?;
    sandbox.ctr_ok(&["task", "kill", "--signal", "KILL", "c"])?;
    sandbox.wait_for_status("c", "STOPPED")?;
    ensure!(sandbox.delete_task("c")? == 137, "not 137");
    Ok(())
}

fn pause(shim: &Shim) -> ttrpc::Result<()> {
    let request = api::PauseRequest {
        id: "c".into(),
        ..api::PauseRequest::default()
    };
    shim.tasks.pause(shim.metadata(), &request).map(drop)
}

/// Answered as runc-v2 does: the signal is sent, or the process has finished.
fn kills_of_a_paused_container_at_the_same_time_are_each_answered(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let before = Footprint::of(&sandbox);
    for round in 0..16 {
        let request = api::KillRequest {
            id: "c".into(),
            signal: 9,
            all: round % 2 == 1,
            ..api::KillRequest::default()
        };
        shim.create("c", bundle.path())?;
        shim.start("c")?;
        pause(&shim)?;
        let others = [(); 3].map(|()| Shim::connect(&sandbox));
        scope(|scope| {
            let kills = others.each_ref().map(|other| {
                scope.spawn(|| {
                    let Ok(other) = other else { return Ok(()) };
                    other.tasks.kill(other.metadata(), &request).map(drop)
                })
            });
            for kill in kills {
                let answer = kill
                    .join()
                    .map_err(|_| anyhow::anyhow!("a request panicked"))?;
                let words = answer.map_or_else(|error| error.to_string(), |()| String::new());
                ensure!(
                    words.is_empty() || words.contains("process already finished"),
                    "round {round}: {words}"
                );
            }
            anyhow::Ok(())
        })?;
        ensure!(
            shim.wait("c")? == 137 && shim.delete("c")? == 137,
            "not 137"
        );
    }
    before.wait_for_return(&sandbox)
}

fn sigkill_ends_an_exec_of_a_paused_container_which_stays_paused(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let before = Footprint::of(&sandbox);
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    shim.exec_with("c", "e", &["sleep", "1000"], |_| {})?;
    let pid = shim.start_exec("c", "e")?.cast_signed();
    pause(&shim)?;
    let kill = api::KillRequest {
        id: "c".into(),
        exec_id: "e".into(),
        signal: 9,
        ..api::KillRequest::default()
    };
    shim.tasks.kill(shim.metadata(), &kill)?;
    until("the exec has ended", || Ok(!is_alive(pid)))?;
    ensure!(shim.wait_exec("c", "e")? == 137, "not 137");
    ensure!(shim.delete_exec("c", "e")? == 137, "not 137");
    let status = shim.state("c")?.status();
    ensure!(status == api::Status::PAUSED, "{status:?}");
    shim.kill("c", Signal::SIGKILL)?;
    ensure!(
        shim.wait("c")? == 137 && shim.delete("c")? == 137,
        "not 137"
    );
    before.wait_for_return(&sandbox)
}

/// A counter of a container's cgroup that cannot be read before this is written to, until it is
/// dropped.
struct SlowCounter {
    fifo: PathBuf,
    counter: PathBuf,
}

impl SlowCounter {
    fn new(sandbox: &Sandbox, pid: u32) -> anyhow::Result<Self> {
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let mut lines = cgroups.lines().filter_map(|line| line.split_once(':'));
        let v1 = lines.find_map(|(_, rest)| rest.strip_prefix("pids:/"));
        let directory = if let Some(path) = v1 {
            PathBuf::from("/sys/fs/cgroup/pids").join(path)
        } else {
            let path = cgroups.trim().strip_prefix("0::/").context("no cgroup")?;
            PathBuf::from("/sys/fs/cgroup").join(path)
        };
        let (fifo, counter) = (
            sandbox.directory().join("counter"),
            directory.join("pids.current"),
        );
        mkfifo(&fifo, Mode::S_IRWXU)?;
        let none = None::<&str>;
        mount(Some(&fifo), &counter, none, MsFlags::MS_BIND, none)?;
        Ok(Self { fifo, counter })
    }
}

impl Drop for SlowCounter {
    fn drop(&mut self) {
        let _ = umount2(&self.counter, MntFlags::MNT_DETACH);
    }
}

/// A busy machine takes seconds to read the counters: the cgroup is there all the same.
fn statistics_that_take_long_are_waited_for_and_not_denied(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    shim.create("c", bundle.path())?;
    let counter = SlowCounter::new(&sandbox, shim.start("c")?)?;
    scope(|scope| {
        let memory = scope.spawn(|| memory(&shim, "c"));
        sleep(Duration::from_secs(3));
        // Waits for the reader, and is all that it reads.
        fs::write(&counter.fifo, "1\n")?;
        let answer = memory
            .join()
            .map_err(|_| anyhow::anyhow!("a request panicked"))?;
        answer.map(drop)
    })?;
    drop(counter);
    shim.kill("c", Signal::SIGKILL)?;
    ensure!(
        shim.wait("c")? == 137 && shim.delete("c")? == 137,
        "not 137"
    );
    Ok(())
}

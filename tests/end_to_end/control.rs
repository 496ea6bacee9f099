//! Kill, pause, resume, ps, metrics.

use anyhow::ensure;
use containerd_shim_protos::api;
use containerd_shim_protos::cgroups::metrics::Metrics;
use containerd_shim_protos::cgroups_v2::metrics::Metrics as MetricsV2;
use embedshim_tests::{Bundle, Shim, Stage, Test};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use serde_json::Value;
use xtask::sandbox::{PATIENCE, Running};

use crate::tests;

pub(crate) const TESTS: [Test; 6] = tests!(AnyRuntime:
    a_signal_reaches_the_init,
    a_paused_container_is_frozen_until_resumed,
    what_the_state_does_not_allow_is_refused_in_runc_v2s_words,
    ps_lists_execs_by_name,
    metrics_count_processes_and_memory,
    a_running_task_is_not_deleted,
);

pub(crate) const OURS: [Test; 2] = tests!(EmbedshimOnly:
    an_update_changes_the_limit,
    a_stopped_task_still_tells_that_it_ran_out_of_memory,
);

fn a_signal_reaches_the_init(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let mut run =
        Running::capture(&mut sandbox.run(&["--rm"], "c", &["guest", "until-term", "33"]))?;
    sandbox.wait_for_status("c", "RUNNING")?;
    // Until its handler is there the signal has no effect, so again until it has.
    xtask::sandbox::until("it ends", || {
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

//! What an operator sees of pods without a pause container: what `status`, `ps --sandboxes`,
//! `inspect`, `metrics` and `report` tell is what there is.

use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};
use embedshim_tests::{Stage, Test};
use serde_json::Value;
use testbed::sandbox::{Sandbox, until};

use crate::operators::{ask, json};
use crate::pods::{HANDLER, OWN_NETWORK, with_pods};
use crate::pods_processes::SHARED_PROCESSES;
use crate::tests;

pub(crate) const TESTS: [Test; 1] = tests!(ContainerdTwo:
    operators_see_each_pod_with_its_state_its_pins_and_its_containers,
);

/// The line of a pod in the list of all; `None` if there is none.
fn line(stage: &Stage, sandbox: &Sandbox, id: &str) -> anyhow::Result<Option<Value>> {
    let listed = json(stage, sandbox, &["ps", "--sandboxes"])?;
    ensure!(listed["is_enabled"] == true, "{listed}");
    let all = listed["sandboxes"].as_array().context("no list")?;
    Ok(all.iter().find(|one| one["id"] == id).cloned())
}

/// The init of a pod that shares its processes is named.
fn shows_init(detail: &Value) -> anyhow::Result<()> {
    let init = detail["init_pid"].as_i64().context("no init")?;
    let name = fs::read_to_string(format!("/proc/{init}/comm"))?;
    ensure!(name.trim() == "embedshim-pod", "{init} is {name}");
    Ok(())
}

fn operators_see_each_pod_with_its_state_its_pins_and_its_containers(
    stage: &Stage,
) -> anyhow::Result<()> {
    let Some((sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let pod = cri.run_pod_with("pod", HANDLER, OWN_NETWORK, |config| {
        config.labels = [("label".to_owned(), "hunter2".to_owned())].into();
    })?;
    let other = cri.run_pod("other", HANDLER, SHARED_PROCESSES)?;
    let container = cri.run_container(&pod, "c", 0, &["sleep", "1000"])?;
    let seen = line(stage, &sandbox, &pod.id)?.context("not listed")?;
    ensure!(
        seen["state"] == "ready" && seen["containers"] == 1 && seen["namespace"] == "k8s.io",
        "{seen}"
    );
    ensure!(seen["age_seconds"].as_f64() < Some(300.0), "{seen}");
    let text = ask(stage, &sandbox, &["ps", "--sandboxes"])?.stdout;
    ensure!(
        text.lines().count() == 3 && text.contains(&pod.id),
        "{text}"
    );

    let detail = json(stage, &sandbox, &["inspect", &pod.id])?;
    let namespaces = detail["namespaces"].as_array().context("no namespaces")?;
    for namespace in namespaces.iter().filter(|one| one["owner"] == "pod") {
        let pin = namespace["pin"].as_str().context("no pin")?;
        ensure!(namespace["is_pinned"] == true, "{detail}");
        ensure!(Path::new(pin).exists(), "{pin} is not there");
    }
    let owners: Vec<&str> = namespaces
        .iter()
        .filter_map(|one| one["owner"].as_str())
        .collect();
    ensure!(
        owners == ["pod", "pod", "pod", "container", "node"],
        "{detail}"
    );
    ensure!(
        detail["tasks"] == serde_json::json!([container]),
        "{detail}"
    );
    let record = detail["record"].as_str().context("no record")?;
    ensure!(Path::new(record).is_file(), "{record} is not there");
    let task = json(stage, &sandbox, &["inspect", &container])?;
    ensure!(task["sandbox"] == pod.id.as_str(), "{task}");
    let text = ask(stage, &sandbox, &["inspect", &pod.id])?.stdout;
    ensure!(text.contains("pinned at"), "{text}");
    ensure!(detail["init_pid"].is_null(), "{detail}");
    shows_init(&json(stage, &sandbox, &["inspect", &other.id])?)?;

    // The successor tells the same, and a stopped pod is one.
    sandbox.kill_daemon()?;
    cri.stop_pod(&other)?;
    let status = json(stage, &sandbox, &["status"])?;
    let expected = serde_json::json!({"created": 0, "ready": 1, "stopping": 0, "stopped": 1});
    ensure!(status["sandboxes"] == expected, "{status}");
    let metrics = ask(stage, &sandbox, &["metrics"])?.stdout;
    for (state, number) in [
        ("created", 0),
        ("ready", 1),
        ("stopping", 0),
        ("stopped", 1),
    ] {
        let sample = format!("embedshim_sandboxes{{state=\"{state}\"}} {number}\n");
        ensure!(metrics.contains(&sample), "{sample}: {metrics}");
    }
    let stopped = json(stage, &sandbox, &["inspect", &other.id])?;
    ensure!(stopped["sandbox"]["exit_code"] == 0, "{stopped}");
    let pins = stopped["namespaces"].as_array().context("no namespaces")?;
    let of_uts = pins.iter().find(|one| one["name"] == "uts");
    ensure!(
        of_uts.is_some_and(|uts| uts["is_pinned"] == false),
        "{stopped}"
    );

    let file = sandbox.directory().join("report.tar");
    let output = file.to_string_lossy().into_owned();
    let told = ask(stage, &sandbox, &["report", "--output", &output])?;
    ensure!(told.code == Some(0), "{told:?}");
    let report = String::from_utf8_lossy(&fs::read(&file)?).into_owned();
    let names = [
        "/sandboxes.json",
        &format!("/sandboxes/k8s.io:{}.json", pod.id),
    ];
    ensure!(names.iter().all(|name| report.contains(name)), "not in it");
    ensure!(!report.contains("hunter2"), "a label is in it");

    cri.remove_pod(&pod)?;
    cri.remove_pod(&other)?;
    let told = ask(stage, &sandbox, &["events", "--json"])?.stdout;
    let of = |id: &str| -> Vec<String> {
        let events = told.lines().filter_map(|line| {
            let event: Value = serde_json::from_str(line).ok()?;
            (event["id"] == id).then(|| event["kind"].as_str().unwrap_or_default().to_owned())
        });
        events.collect()
    };
    // By this daemon, which has not started them.
    ensure!(
        of(&other.id) == ["sandbox-stopped", "sandbox-removed"],
        "{told}"
    );
    until("they are gone", || {
        Ok(
            line(stage, &sandbox, &pod.id)?.is_none()
                && line(stage, &sandbox, &other.id)?.is_none(),
        )
    })
}

//! What kubelet does with any pod, with pods without a pause container: the tests of `kubernetes`,
//! with the handler whose sandbox controller is our daemon.

use std::fs;
use std::process::Command;

use anyhow::{Context, ensure};
use embedshim_tests::{Cri, Namespaces, NriPlugin, Pod, Stage, Test, VARIABLE};
use k8s_cri::v1::ContainerState;
use testbed::releases;
use testbed::sandbox::Sandbox;

use crate::kubernetes;
use crate::pods::{HANDLER, OWN_NETWORK, seen, with_pods, with_prepared};
use crate::tests;

pub(crate) const TESTS: [Test; 9] = tests!(ContainerdTwo:
    a_pods_life_without_a_pause_container,
    a_probe_that_takes_too_long_is_ended_without_a_pause_container,
    a_pod_without_a_pause_container_has_a_network_and_its_usage_is_known,
    containers_of_a_pod_share_its_pid_namespace_without_a_pause_container,
    a_container_is_checkpointed_as_in_a_pod_with_a_pause_container,
    a_handler_goes_to_our_controller_and_back_under_its_pods,
    kubectl_exec_has_its_streams_without_a_pause_container,
    kubectl_attach_can_come_back_without_a_pause_container,
    a_plugin_of_nri_hears_of_such_pods_and_adjusts_their_containers,
);

fn a_pods_life_without_a_pause_container(stage: &Stage) -> anyhow::Result<()> {
    with_pods(stage)?.map_or(Ok(()), |(sandbox, mut cri)| {
        kubernetes::life(&sandbox, &mut cri, HANDLER)
    })
}

fn a_probe_that_takes_too_long_is_ended_without_a_pause_container(
    stage: &Stage,
) -> anyhow::Result<()> {
    with_pods(stage)?.map_or(Ok(()), |(_sandbox, mut cri)| {
        kubernetes::probe_too_long(&mut cri, HANDLER)
    })
}

fn a_pod_without_a_pause_container_has_a_network_and_its_usage_is_known(
    stage: &Stage,
) -> anyhow::Result<()> {
    with_pods(stage)?.map_or(Ok(()), |(sandbox, mut cri)| {
        kubernetes::network_and_usage(&sandbox, &mut cri, HANDLER)
    })
}

fn containers_of_a_pod_share_its_pid_namespace_without_a_pause_container(
    stage: &Stage,
) -> anyhow::Result<()> {
    with_pods(stage)?.map_or(Ok(()), |(_sandbox, mut cri)| {
        kubernetes::shared_processes(&mut cri, HANDLER, "embedshim-pod")
    })
}

/// By the CRI's `CheckpointContainer`, as `kubectl checkpoint` and kubelet do it.
fn a_container_is_checkpointed_as_in_a_pod_with_a_pause_container(
    stage: &Stage,
) -> anyhow::Result<()> {
    let with_criu = with_prepared(stage, |sandbox| {
        let path = std::env::var("PATH")?;
        let path = format!("{}:{path}", releases::criu()?.display());
        sandbox.set_environment("PATH", &path);
        Ok(())
    })?;
    let Some((sandbox, mut cri)) = with_criu else {
        return Ok(());
    };
    for handler in ["path", HANDLER] {
        let pod = cri.run_pod(handler, handler, OWN_NETWORK)?;
        let id = cri.run_container(&pod, "c", 0, &["sleep", "1000"])?;
        let archive = sandbox.directory().join(format!("{handler}.tar"));
        cri.checkpoint(&id, &archive).with_context(|| handler)?;
        let listed = Command::new("tar").arg("-tf").arg(&archive).output()?;
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        ensure!(
            listed.contains("checkpoint/pstree.img"),
            "{handler}: {listed}"
        );
        let running = i32::from(ContainerState::ContainerRunning);
        ensure!(
            cri.status(&id)?.state == running,
            "{handler}: it does not run"
        );
        ensure!(seen(&mut cri, &id, "echo runs")? == "runs\n", "{handler}");
        cri.remove_pod(&pod)?;
    }
    Ok(())
}

/// Each pod keeps the controller that has made it.
fn a_handler_goes_to_our_controller_and_back_under_its_pods(stage: &Stage) -> anyhow::Result<()> {
    let Some((mut sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let is_ours = |sandbox: &Sandbox, pod: &Pod| {
        let record = format!("sandboxes/k8s.io:{}.json", pod.id);
        sandbox.state_dir().join(record).exists()
    };
    let mut pods: Vec<(Pod, String)> = Vec::new();
    for (name, has_our_controller) in [("before", false), ("meanwhile", true), ("after", false)] {
        if !pods.is_empty() {
            drop(cri);
            switch(&mut sandbox, has_our_controller)?;
            cri = Cri::connect(&sandbox)?;
        }
        let pod = cri.run_pod(name, "path", Namespaces::SIMPLE)?;
        ensure!(is_ours(&sandbox, &pod) == has_our_controller, "{name}");
        let id = cri.run_container(&pod, name, 0, &["sleep", "1000"])?;
        pods.push((pod, id));
        for (number, (pod, id)) in pods.iter().enumerate() {
            ensure!(cri.is_ready(pod)? == (true, true), "{number} after {name}");
            ensure!(
                seen(&mut cri, id, "echo runs")? == "runs\n",
                "{number} after {name}"
            );
            let late = format!("late-{name}-{number}");
            cri.run_container(pod, &late, 0, &["sleep", "1000"])?;
        }
    }
    for (pod, _) in &pods {
        cri.remove_pod(pod)?;
    }
    ensure!(
        !pods.iter().any(|(pod, _)| is_ours(&sandbox, pod)),
        "a record is left"
    );
    Ok(())
}

/// Gives the pods of one handler another controller, as an operator does.
fn switch(sandbox: &mut Sandbox, to_ours: bool) -> anyhow::Result<()> {
    const OURS: &str = "      sandboxer = \"embed\"\n";
    let file = sandbox.directory().join("containerd.toml");
    let text = fs::read_to_string(&file)?;
    let (head, rest) = text.split_once("runtimes.path]\n").context("no handler")?;
    let rest = rest.strip_prefix(OURS).unwrap_or(rest);
    let ours = if to_ours { OURS } else { "" };
    sandbox.stop_containerd()?;
    fs::write(&file, format!("{head}runtimes.path]\n{ours}{rest}"))?;
    sandbox.start_containerd()
}

fn kubectl_exec_has_its_streams_without_a_pause_container(stage: &Stage) -> anyhow::Result<()> {
    with_pods(stage)?.map_or(Ok(()), |(_sandbox, mut cri)| {
        kubernetes::exec_streams(&mut cri, HANDLER)
    })
}

fn kubectl_attach_can_come_back_without_a_pause_container(stage: &Stage) -> anyhow::Result<()> {
    with_pods(stage)?.map_or(Ok(()), |(_sandbox, mut cri)| {
        kubernetes::attach_again(&mut cri, HANDLER)
    })
}

/// Beside a pod with a pause container, for which it hears the same.
fn a_plugin_of_nri_hears_of_such_pods_and_adjusts_their_containers(
    stage: &Stage,
) -> anyhow::Result<()> {
    let with_nri = with_prepared(stage, |sandbox| {
        sandbox.enable_nri();
        Ok(())
    })?;
    let Some((sandbox, mut cri)) = with_nri else {
        return Ok(());
    };
    let plugin = NriPlugin::connect(&sandbox.directory().join("nri.sock"))?;
    for handler in ["path", HANDLER] {
        let pod = cri.run_pod(handler, handler, OWN_NETWORK)?;
        plugin.hears(&format!("run pod {handler}"))?;
        let id = cri.run_container(&pod, "c", 0, &["sleep", "1000"])?;
        for event in ["create", "start"] {
            plugin.hears(&format!("{event} c of {handler}"))?;
        }
        let variable = seen(&mut cri, &id, &format!("echo ${VARIABLE}"))?;
        ensure!(variable == format!("{handler}\n"), "{variable:?}");
        cri.remove_pod(&pod)?;
        for event in ["stop c of", "stop pod", "remove pod"] {
            plugin.hears(&format!("{event} {handler}"))?;
        }
    }
    Ok(())
}

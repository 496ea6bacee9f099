//! What kubelet does with any pod, with pods without a pause container: the tests of `kubernetes`,
//! with the handler whose sandbox controller is our daemon.

use std::process::Command;

use anyhow::{Context, ensure};
use embedshim_tests::{Stage, Test};
use k8s_cri::v1::ContainerState;
use testbed::releases;

use crate::kubernetes;
use crate::pods::{HANDLER, OWN_NETWORK, seen, with_pods, with_prepared};
use crate::tests;

pub(crate) const TESTS: [Test; 7] = tests!(ContainerdTwo:
    a_pods_life_without_a_pause_container,
    a_probe_that_takes_too_long_is_ended_without_a_pause_container,
    a_pod_without_a_pause_container_has_a_network_and_its_usage_is_known,
    containers_of_a_pod_share_its_pid_namespace_without_a_pause_container,
    a_container_is_checkpointed_as_in_a_pod_with_a_pause_container,
    kubectl_exec_has_its_streams_without_a_pause_container,
    kubectl_attach_can_come_back_without_a_pause_container,
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

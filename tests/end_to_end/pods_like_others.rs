//! What kubelet does with any pod, with pods without a pause container: the tests of `kubernetes`,
//! with the handler whose sandbox controller is our daemon.

use embedshim_tests::{Stage, Test};

use crate::kubernetes;
use crate::pods::{HANDLER, with_pods};
use crate::tests;

pub(crate) const TESTS: [Test; 6] = tests!(ContainerdTwo:
    a_pods_life_without_a_pause_container,
    a_probe_that_takes_too_long_is_ended_without_a_pause_container,
    a_pod_without_a_pause_container_has_a_network_and_its_usage_is_known,
    containers_of_a_pod_share_its_pid_namespace_without_a_pause_container,
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

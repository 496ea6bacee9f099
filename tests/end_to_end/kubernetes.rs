//! Pods and their containers through the CRI, as kubelet runs them.

use std::time::Duration;

use anyhow::{Context, ensure};
use embedshim_tests::{Cri, Footprint, Namespaces, Stage, Test};
use k8s_cri::v1::{ContainerState, NamespaceMode};
use nix::sys::signal::Signal;
use testbed::sandbox::{Sandbox, until};

use crate::tests;

pub(crate) const TESTS: [Test; 8] = tests!(EmbedshimOnly:
    a_pods_life_with_our_own_runtime_type,
    a_pods_life_with_runc_v2s_type_and_our_path,
    a_probe_that_takes_too_long_is_ended,
    containers_of_a_pod_can_share_its_pid_namespace,
    pods_outlive_containerd_and_the_daemon,
    a_pod_has_a_network_and_its_usage_is_known,
    kubectl_exec_has_its_streams_and_its_status,
    kubectl_attach_can_come_back,
);

pub(crate) const LONG: Duration = Duration::from_secs(20);

fn with_cri(stage: &Stage) -> anyhow::Result<(Sandbox, Cri)> {
    let mut sandbox = stage.bare_sandbox()?;
    sandbox.enable_cri()?;
    sandbox.start_containerd()?;
    sandbox.import_for_kubernetes(stage.archive())?;
    let cri = Cri::connect(&sandbox)?;
    Ok((sandbox, cri))
}

/// Waits for the end of a container and returns its exit code and reason.
pub(crate) fn ended(cri: &mut Cri, id: &str) -> anyhow::Result<(i32, String)> {
    let mut end = None;
    until("the container has ended", || {
        let status = cri.status(id)?;
        end = (status.state == i32::from(ContainerState::ContainerExited))
            .then_some((status.exit_code, status.reason));
        Ok(end.is_some())
    })?;
    end.context("no end")
}

/// Waits until a program handles SIGTERM, by what it prints.
fn ready(cri: &Cri, name: &str, attempt: u32) -> anyhow::Result<()> {
    until("it says that it is ready", || {
        Ok(cri.log(name, attempt).contains("stdout F ready"))
    })
}

/// A pod with a container that ends at SIGTERM, one that is killed and one that ends by itself.
pub(crate) fn life(sandbox: &Sandbox, cri: &mut Cri, handler: &str) -> anyhow::Result<()> {
    let first = cri.run_pod("first", handler, Namespaces::SIMPLE)?;
    let before = Footprint::of(sandbox);
    let pod = cri.run_pod("pod", handler, Namespaces::SIMPLE)?;
    let id = cri.run_container(&pod, "c", 0, &["guest", "until-term", "33"])?;
    ready(cri, "c", 0)?;
    ensure!(
        cri.status(&id)?.state == i32::from(ContainerState::ContainerRunning),
        "it does not run"
    );
    let executed = cri.exec(&id, &["sh", "-c", "echo probed; exit 4"], LONG)?;
    ensure!(
        (executed.code, executed.stdout.as_str()) == (4, "probed\n"),
        "{executed:?}"
    );
    ensure!(cri.memory(&id)? > 0, "no memory is used");
    // It ends by itself at SIGTERM, long before the grace period is over.
    cri.stop(&id, LONG)?;
    let end = ended(cri, &id)?;
    ensure!(end == (33, "Error".into()), "{end:?}");
    // The next attempt, which has to be killed.
    let again = cri.run_container(&pod, "c", 1, &["sleep", "1000"])?;
    cri.stop(&again, Duration::from_secs(1))?;
    let end = ended(cri, &again)?;
    ensure!(end.0 == 137, "{end:?}");
    let quick = cri.run_container(&pod, "quick", 0, &["sh", "-c", "echo done"])?;
    let end = ended(cri, &quick)?;
    ensure!(end == (0, "Completed".into()), "{end:?}");
    until("its log is whole", || {
        Ok(cri.log("quick", 0).contains("stdout F done"))
    })?;
    for id in [&id, &again, &quick] {
        cri.remove(id)?;
    }
    cri.remove_pod(&pod)?;
    before.wait_for_return(sandbox)?;
    cri.remove_pod(&first)
}

fn a_pods_life_with_our_own_runtime_type(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, mut cri) = with_cri(stage)?;
    life(&sandbox, &mut cri, "embed")
}

fn a_pods_life_with_runc_v2s_type_and_our_path(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, mut cri) = with_cri(stage)?;
    life(&sandbox, &mut cri, "path")
}

fn a_probe_that_takes_too_long_is_ended(stage: &Stage) -> anyhow::Result<()> {
    let (_sandbox, mut cri) = with_cri(stage)?;
    probe_too_long(&mut cri, "embed")
}

/// A probe that is ended at its limit, and one after it.
pub(crate) fn probe_too_long(cri: &mut Cri, handler: &str) -> anyhow::Result<()> {
    let pod = cri.run_pod("pod", handler, Namespaces::SIMPLE)?;
    let id = cri.run_container(&pod, "c", 0, &["sleep", "1000"])?;
    let error = cri
        .exec(&id, &["sleep", "997"], Duration::from_secs(1))
        .unwrap_err();
    ensure!(
        error.message().contains("timeout") || error.code() == tonic::Code::DeadlineExceeded,
        "{error}"
    );
    let left = || {
        let lines = std::fs::read_dir("/proc")?
            .flatten()
            .map(|entry| std::fs::read(entry.path().join("cmdline")));
        Ok(!lines.flatten().any(|line| line == b"sleep\x00997\x00"))
    };
    until("the probe is killed", left)?;
    ensure!(
        cri.exec(&id, &["true"], LONG)?.code == 0,
        "probes do not work any more"
    );
    cri.remove_pod(&pod)
}

fn containers_of_a_pod_can_share_its_pid_namespace(stage: &Stage) -> anyhow::Result<()> {
    let (_sandbox, mut cri) = with_cri(stage)?;
    // The pause container's.
    shared_processes(&mut cri, "embed", "until-term 0")
}

/// Two containers of a pod see each other's processes, and this one, which is the init.
pub(crate) fn shared_processes(cri: &mut Cri, handler: &str, init: &str) -> anyhow::Result<()> {
    let shared = Namespaces {
        pid: NamespaceMode::Pod,
        ..Namespaces::SIMPLE
    };
    let pod = cri.run_pod("pod", handler, shared)?;
    let id = cri.run_container(
        &pod,
        "c",
        0,
        &[
            "sh",
            "-c",
            "sleep 1000 & echo started; exec guest until-term 12",
        ],
    )?;
    ready(cri, "c", 0)?;
    let seen = cri.exec(&id, &["ps"], LONG)?.stdout;
    ensure!(
        seen.contains(init) && seen.contains("until-term 12"),
        "{seen}"
    );
    cri.stop(&id, LONG)?;
    let end = ended(cri, &id)?;
    ensure!(end.0 == 12, "{end:?}");
    // Its child would keep the pod's namespace busy.
    let other = cri.run_container(&pod, "other", 0, &["sleep", "1000"])?;
    let seen = cri.exec(&other, &["ps"], LONG)?.stdout;
    ensure!(!seen.contains("until-term 12"), "{seen}");
    ensure!(
        seen.matches("sleep 1000").count() == 1,
        "the child lives on: {seen}"
    );
    cri.remove_pod(&pod)
}

fn pods_outlive_containerd_and_the_daemon(stage: &Stage) -> anyhow::Result<()> {
    let (mut sandbox, mut cri) = with_cri(stage)?;
    let pod = cri.run_pod("pod", "embed", Namespaces::SIMPLE)?;
    let running = cri.run_container(&pod, "running", 0, &["sleep", "1000"])?;
    let nine = cri.run_container(
        &pod,
        "nine",
        0,
        &[
            "sh",
            "-c",
            "until [ -e /tmp/go ]; do sleep 0.05; done; exit 9",
        ],
    )?;
    drop(cri);
    sandbox.stop_containerd()?;
    sandbox.end_daemon(Signal::SIGKILL)?;
    let rootfs = sandbox
        .directory()
        .join("state/io.containerd.runtime.v2.task/k8s.io")
        .join(&nine)
        .join("rootfs");
    std::fs::write(rootfs.join("tmp/go"), "")?;
    sandbox.start_daemon()?;
    sandbox.start_containerd()?;
    let mut cri = Cri::connect(&sandbox)?;
    until("the CRI answers", || Ok(cri.status(&running).is_ok()))?;
    let end = ended(&mut cri, &nine)?;
    ensure!(end.0 == 9, "{end:?}");
    ensure!(
        cri.status(&running)?.state == i32::from(ContainerState::ContainerRunning),
        "it does not run"
    );
    ensure!(
        cri.exec(&running, &["true"], LONG)?.code == 0,
        "no probe after the restart"
    );
    cri.remove_pod(&pod)
}

fn a_pod_has_a_network_and_its_usage_is_known(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, mut cri) = with_cri(stage)?;
    network_and_usage(&sandbox, &mut cri, "embed")
}

/// An address, and what `kubectl top` shows.
pub(crate) fn network_and_usage(
    sandbox: &Sandbox,
    cri: &mut Cri,
    handler: &str,
) -> anyhow::Result<()> {
    let first = cri.run_pod("first", handler, Namespaces::SIMPLE)?;
    let before = Footprint::of(sandbox);
    let own_network = Namespaces {
        network: NamespaceMode::Pod,
        ..Namespaces::SIMPLE
    };
    let pod = cri.run_pod("pod", handler, own_network)?;
    let address = cri.address(&pod)?;
    ensure!(address.starts_with("192.0.2."), "{address}");
    let id = cri.run_container(&pod, "c", 0, &["sleep", "1000"])?;
    let seen = cri.exec(&id, &["busybox", "ip", "-4", "addr", "show", "eth0"], LONG)?;
    ensure!(
        seen.stdout.contains(&format!("inet {address}/")),
        "{seen:?}"
    );
    let usage = cri.pod_usage(&pod)?;
    let memory = usage.memory.and_then(|memory| memory.working_set_bytes);
    ensure!(memory.is_some_and(|bytes| bytes.value > 0), "{memory:?}");
    let network = usage.network.and_then(|network| network.default_interface);
    ensure!(
        network.as_ref().is_some_and(|eth| eth.name == "eth0"),
        "{network:?}"
    );
    let processes = usage.process.and_then(|process| process.process_count);
    ensure!(
        processes.is_some_and(|count| count.value == 1),
        "{processes:?}"
    );
    let [container] = usage.containers.as_slice() else {
        anyhow::bail!("one container, not {:?}", usage.containers);
    };
    ensure!(container.cpu.is_some(), "{container:?}");
    cri.remove_pod(&pod)?;
    before.wait_for_return(sandbox)?;
    cri.remove_pod(&first)
}

fn kubectl_exec_has_its_streams_and_its_status(stage: &Stage) -> anyhow::Result<()> {
    let (_sandbox, mut cri) = with_cri(stage)?;
    exec_streams(&mut cri, "embed")
}

/// `kubectl exec`, plain and on a terminal.
pub(crate) fn exec_streams(cri: &mut Cri, handler: &str) -> anyhow::Result<()> {
    let pod = cri.run_pod("pod", handler, Namespaces::SIMPLE)?;
    let id = cri.run_container(&pod, "c", 0, &["sleep", "1000"])?;
    let mut plain = cri.exec_streaming(&id, &["sh"], false)?;
    plain.write("echo out; echo complaint >&2; exit 5\n")?;
    let status = plain.finish()?;
    let streams = (plain.stdout.as_str(), plain.stderr.as_str());
    ensure!(streams == ("out\n", "complaint\n"), "{streams:?}");
    ensure!(status.contains(r#""message":"5""#), "{status}");
    let mut terminal = cri.exec_streaming(&id, &["sh"], true)?;
    terminal.resize(101, 33)?;
    terminal.write(
        "until [ \"$(stty size)\" = '33 101' ]; do sleep 0.02; done; echo re''sized; exit 3\n",
    )?;
    terminal.wait_for("resized")?;
    let status = terminal.finish()?;
    ensure!(status.contains(r#""message":"3""#), "{status}");
    cri.remove_pod(&pod)
}

fn kubectl_attach_can_come_back(stage: &Stage) -> anyhow::Result<()> {
    let (_sandbox, mut cri) = with_cri(stage)?;
    attach_again(&mut cri, "embed")
}

/// `kubectl attach`, several times.
pub(crate) fn attach_again(cri: &mut Cri, handler: &str) -> anyhow::Result<()> {
    let pod = cri.run_pod("pod", handler, Namespaces::SIMPLE)?;
    let script =
        "while read line; do echo \"got $line\"; [ \"$line\" != end ] || exit 6; done; exit 7";
    let id = cri.run_interactive(&pod, "c", &["sh", "-c", script])?;
    for line in ["first", "second"] {
        let mut attached = cri.attach(&id)?;
        attached.write(&format!("{line}\n"))?;
        attached.wait_for(&format!("got {line}"))?;
    }
    let mut last = cri.attach(&id)?;
    last.write("end\n")?;
    let end = ended(cri, &id)?;
    ensure!(end.0 == 6, "{end:?}");
    cri.remove_pod(&pod)
}

//! Pods without a pause container while what serves them is killed, and what is left of them by
//! programs that are gone: no process holds a pod, so all of it is in records and in the kernel.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use embedshim_tests::{Controller, Cri, Footprint, Namespaces, Pod, Stage, Test};
use k8s_cri::v1::ContainerState;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::sandbox::{Sandbox, is_alive, until};
use tonic::Code;

use crate::kubernetes::ended;
use crate::pods::{Frozen, HANDLER, OWN_NETWORK, end, seen, with_pods};
use crate::pods_processes::{SHARED_PROCESSES, init_of, record_of};
use crate::tests;

pub(crate) const TESTS: [Test; 10] = tests!(ContainerdTwo:
    a_pod_that_containerd_has_forgotten_makes_way_for_one_of_its_name,
    pods_without_a_process_outlive_the_daemon_and_containerd,
    a_daemon_that_dies_at_any_step_of_a_pod_leaves_nothing_of_it,
    a_daemon_that_dies_at_any_step_of_a_pod_with_an_init_leaves_nothing_of_it,
    an_init_that_was_killed_is_told_as_killed_by_a_successor_too,
    a_container_that_containerd_gives_up_with_its_connection_is_killed,
    a_frozen_container_that_containerd_gives_up_is_killed_all_the_same,
    containerd_that_gives_a_bundle_up_after_its_restart_asks_our_launcher,
    a_pod_whose_namespaces_are_lost_has_ended_and_can_be_removed,
    the_record_and_the_socket_of_pods_are_made_again,
);

/// As before 2.3 after a plugin of NRI has refused it: containerd tells the controller nothing.
fn a_pod_that_containerd_has_forgotten_makes_way_for_one_of_its_name(
    stage: &Stage,
) -> anyhow::Result<()> {
    let Some((sandbox, _cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let socket = sandbox.state_dir().join("pods.sock");
    let mut controller = Controller::connect(&socket)?;
    let created = controller.create_named("forgotten", "pod", false);
    ensure!(created.is_none(), "{created:?}");
    controller.start("forgotten")?;
    // One whose end a client waits for is not forgotten.
    let mut waiting = Controller::connect(&socket)?;
    waiting.begin_waits("forgotten", 1)?;
    // It comes after the wait.
    waiting.ask("Status", "forgotten")?;
    let refused = controller.create_named("next", "pod", false);
    ensure!(refused == Some(Code::AlreadyExists), "{refused:?}");
    drop(waiting);
    until("it makes way", || {
        Ok(controller.create_named("next", "pod", false).is_none())
    })?;
    controller.start("next")?;
    let records = sandbox.state_dir().join("sandboxes");
    ensure!(
        !records.join("k8s.io:forgotten.json").exists()
            && records.join("k8s.io:next.json").exists(),
        "the wrong one is left"
    );
    controller.ask("Stop", "next")?;
    controller.ask("Shutdown", "next")?;
    Ok(())
}

/// A clean-up of `/run` removes them.
fn the_record_and_the_socket_of_pods_are_made_again(stage: &Stage) -> anyhow::Result<()> {
    let Some((sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let pod = cri.run_pod("pod", HANDLER, Namespaces::SIMPLE)?;
    let records = sandbox.state_dir().join("sandboxes");
    let socket = sandbox.state_dir().join("pods.sock");
    fs::remove_dir_all(&records)?;
    fs::remove_file(&socket)?;
    let record = records.join(format!("k8s.io:{}.json", pod.id));
    until("they are made again", || {
        Ok(record.exists() && UnixStream::connect(&socket).is_ok())
    })?;
    sandbox.kill_daemon()?;
    until("the pod is ready", || {
        Ok(cri.is_ready(&pod).is_ok_and(|is| is == (true, true)))
    })?;
    cri.remove_pod(&pod)
}

/// As after a reboot, or after an unmount by hand.
fn a_pod_whose_namespaces_are_lost_has_ended_and_can_be_removed(
    stage: &Stage,
) -> anyhow::Result<()> {
    let Some((sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let first = cri.run_pod("first", HANDLER, Namespaces::SIMPLE)?;
    let before = Footprint::of(&sandbox);
    let rebooted = cri.run_pod("rebooted", HANDLER, OWN_NETWORK)?;
    let unpinned = cri.run_pod("unpinned", HANDLER, OWN_NETWORK)?;
    sandbox.end_daemon(Signal::SIGKILL)?;
    let state_dir = sandbox.state_dir();
    let record = state_dir.join(format!("sandboxes/k8s.io:{}.json", rebooted.id));
    let text = fs::read_to_string(&record)?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    ensure!(text.contains(boot.trim()), "{text}");
    fs::write(&record, text.replace(boot.trim(), "another"))?;
    let pin = state_dir.join(format!("pods/k8s.io/{}/ns/uts", unpinned.id));
    umount2(&pin, MntFlags::MNT_DETACH)?;
    // A link of a pod of which nothing else is left.
    let links = sandbox
        .directory()
        .join("root/io.containerd.grpc.v1.cri/sandboxes");
    let dangling = links.join("gone");
    std::os::unix::fs::symlink(state_dir.join("pods/k8s.io/gone"), &dangling)?;
    sandbox.start_daemon()?;
    ensure!(!dangling.is_symlink(), "a link leads nowhere");
    for pod in [&rebooted, &unpinned] {
        until("the pod has ended", || {
            Ok(cri.is_ready(pod).is_ok_and(|is| is == (false, false)))
        })?;
        cri.run_container(pod, "c", 0, &["true"]).unwrap_err();
        cri.stop_pod(pod)?;
        cri.remove_pod(pod)?;
    }
    ensure!(cri.is_ready(&first)? == (true, true), "not ready");
    before.wait_for_return(&sandbox)?;
    cri.remove_pod(&first)
}

fn pods_without_a_process_outlive_the_daemon_and_containerd(stage: &Stage) -> anyhow::Result<()> {
    let Some((mut sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let first = cri.run_pod("first", HANDLER, Namespaces::SIMPLE)?;
    let before = Footprint::of(&sandbox);
    let pod = cri.run_pod("pod", HANDLER, OWN_NETWORK)?;
    let one = cri.run_container(&pod, "one", 0, &["guest", "until-term", "33"])?;
    for is_polite in [false, true] {
        if is_polite {
            sandbox.replace_daemon(Signal::SIGTERM)?;
        } else {
            sandbox.kill_daemon()?;
        }
        // containerd waits for the end of the pod again; a failure would be the end.
        std::thread::sleep(Duration::from_millis(500));
        ensure!(cri.is_ready(&pod)? == (true, true), "not ready");
        seen(&mut cri, &one, "echo x > /dev/shm/x")?;
    }
    // The daemon becomes the keeper, and starts another.
    let daemon = sandbox.daemon_pid().context("no daemon")?;
    sandbox.end_keeper()?;
    sandbox.successor_of(daemon)?;
    until("the pod is ready", || {
        Ok(cri.is_ready(&pod).is_ok_and(|is| is == (true, true)))
    })?;
    sandbox.kill_containerd()?;
    sandbox.kill_daemon()?;
    sandbox.start_containerd()?;
    let mut cri = Cri::connect(&sandbox)?;
    ensure!(cri.is_ready(&pod)? == (true, true), "not ready");
    let running = i32::from(ContainerState::ContainerRunning);
    ensure!(cri.status(&one)?.state == running, "it does not run");
    // A new container finds what the pod has shared before.
    let two = cri.run_container(&pod, "two", 0, &["sleep", "1000"])?;
    ensure!(
        seen(
            &mut cri,
            &two,
            "cat /dev/shm/x; [ -s /etc/hosts ] && echo hosts"
        )? == "x\nhosts\n",
        "not shared"
    );
    end(&mut cri, &pod, &one)?;
    before.wait_for_return(&sandbox)?;
    cri.remove_pod(&first)
}

fn a_daemon_that_dies_at_any_step_of_a_pod_leaves_nothing_of_it(
    stage: &Stage,
) -> anyhow::Result<()> {
    deaths_at_any_step(stage, OWN_NETWORK)
}

fn a_daemon_that_dies_at_any_step_of_a_pod_with_an_init_leaves_nothing_of_it(
    stage: &Stage,
) -> anyhow::Result<()> {
    deaths_at_any_step(stage, SHARED_PROCESSES)
}

/// The lives of one pod again and again; each time the daemon dies at the next of its lasting
/// steps.
fn deaths_at_any_step(stage: &Stage, namespaces: Namespaces) -> anyhow::Result<()> {
    let Some((sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let first = cri.run_pod("first", HANDLER, namespaces)?;
    let before = Footprint::of(&sandbox);
    let mut step = 1;
    loop {
        let deaths = deaths(&sandbox);
        arm(&sandbox, step)?;
        let context = || format!("step {step}: {}", last_death(&sandbox));
        // containerd tries for a second to reach a controller that was killed. A pod that it does
        // not ask the armed daemon for would be taken for one whose steps are all done.
        wait_until_ready(&mut cri, &first).with_context(context)?;
        let pod = cri.run_pod(&format!("pod-{step}"), HANDLER, namespaces);
        if let Ok(pod) = &pod {
            // Until a daemon is there again.
            until("the pod is stopped", || Ok(cri.stop_pod(pod).is_ok())).with_context(context)?;
            until("the pod is removed", || Ok(cri.remove_pod(pod).is_ok()))
                .with_context(context)?;
        }
        before.wait_for_return(&sandbox).with_context(context)?;
        wait_until_ready(&mut cri, &first).with_context(context)?;
        if self::deaths(&sandbox) == deaths {
            pod.with_context(|| format!("step {step}: refused by a daemon that lives"))?;
            break;
        }
        step += 1;
    }
    // Of the start alone there are ten.
    ensure!(step > 20, "the daemon died at {step} steps only");
    // The last one is armed still.
    sandbox.kill_daemon()?;
    until("the other pod is removed", || {
        Ok(cri.remove_pod(&first).is_ok())
    })
}

/// The daemon dies at each of the steps in which it releases what the pod has.
fn an_init_that_was_killed_is_told_as_killed_by_a_successor_too(
    stage: &Stage,
) -> anyhow::Result<()> {
    let Some((sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    for step in 1.. {
        let deaths = deaths(&sandbox);
        let pod = cri.run_pod(&format!("pod-{step}"), HANDLER, SHARED_PROCESSES)?;
        let init = Pid::from_raw(init_of(&sandbox, &pod)?);
        arm(&sandbox, step)?;
        kill(init, Signal::SIGKILL)?;
        let code = || {
            let text = fs::read_to_string(record_of(&sandbox, &pod))?;
            let record: serde_json::Value = serde_json::from_str(&text)?;
            let code = record.pointer("/ended/code").cloned();
            Ok(code.filter(|_| record["phase"] == "stopped"))
        };
        until("the pod has ended", || {
            Ok(code().is_ok_and(|code| code.is_some()))
        })?;
        let code: anyhow::Result<Option<serde_json::Value>> = code();
        let code = code?.unwrap_or_default();
        ensure!(code == 137, "step {step}: {code}: {}", last_death(&sandbox));
        until("the pod is removed", || Ok(cri.remove_pod(&pod).is_ok()))?;
        if self::deaths(&sandbox) == deaths {
            ensure!(step > 3, "the daemon died at {step} steps only");
            break;
        }
    }
    Ok(())
}

fn wait_until_ready(cri: &mut Cri, pod: &Pod) -> anyhow::Result<()> {
    until("the other pod is ready", || {
        Ok(cri.is_ready(pod).is_ok_and(|is| is == (true, true)))
    })
}

fn deaths(sandbox: &Sandbox) -> usize {
    sandbox.daemon_log().matches("failpoint:").count()
}

fn last_death(sandbox: &Sandbox) -> String {
    let log = sandbox.daemon_log();
    let mut deaths = log.lines().filter(|line| line.contains("failpoint:"));
    deaths.next_back().unwrap_or_default().to_owned()
}

/// Has a daemon serve that dies at this step.
fn arm(sandbox: &Sandbox, step: u32) -> anyhow::Result<()> {
    let file = sandbox.state_dir().join("failpoint");
    fs::write(&file, step.to_string())?;
    sandbox.kill_daemon()?;
    ensure!(
        !file.exists(),
        "embedshimd was built without the feature `failpoints`"
    );
    Ok(())
}

/// Keeper and daemon are killed: containerd takes the container for dead, and tells no program of
/// it.
fn a_container_that_containerd_gives_up_with_its_connection_is_killed(
    stage: &Stage,
) -> anyhow::Result<()> {
    given_up(stage, false)
}

fn a_frozen_container_that_containerd_gives_up_is_killed_all_the_same(
    stage: &Stage,
) -> anyhow::Result<()> {
    given_up(stage, true)
}

fn given_up(stage: &Stage, is_frozen: bool) -> anyhow::Result<()> {
    let Some((sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let first = cri.run_pod("first", HANDLER, Namespaces::SIMPLE)?;
    let before = Footprint::of(&sandbox);
    let pod = cri.run_pod("pod", HANDLER, Namespaces::SIMPLE)?;
    let id = cri.run_container(&pod, "c", 0, &["sleep", "1000"])?;
    let record = sandbox.state_dir().join(format!("tasks/k8s.io:{id}.json"));
    let text = fs::read_to_string(&record)?;
    let record_of: serde_json::Value = serde_json::from_str(&text)?;
    let pid = record_of.pointer("/init/identity/pid");
    let pid = i32::try_from(pid.and_then(serde_json::Value::as_i64).context("no pid")?)?;
    ensure!(is_alive(pid), "it does not run");
    let frozen = is_frozen
        .then(|| Frozen::freeze(&sandbox, &id))
        .transpose()?;
    sandbox.end_daemon(Signal::SIGKILL)?;
    let end = ended(&mut cri, &id)?;
    ensure!(end.0 == 255, "{end:?}");
    ensure!(is_alive(pid), "it was not there to be killed");
    sandbox.start_daemon()?;
    until("it is killed and forgotten", || {
        Ok(!is_alive(pid) && !record.exists())
    })
    .with_context(|| sandbox.daemon_log())?;
    until("the pod is removed", || Ok(cri.remove_pod(&pod).is_ok()))?;
    before
        .wait_for_return(&sandbox)
        .with_context(|| sandbox.daemon_log())?;
    drop(frozen);
    cri.remove_pod(&first)
}

/// Without the path of our launcher in the bundle that would be runc-v2's shim, behind our back.
fn containerd_that_gives_a_bundle_up_after_its_restart_asks_our_launcher(
    stage: &Stage,
) -> anyhow::Result<()> {
    let Some((mut sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let pod = cri.run_pod("pod", HANDLER, Namespaces::SIMPLE)?;
    let id = cri.run_container(&pod, "c", 0, &["sleep", "1000"])?;
    let bundle = sandbox
        .directory()
        .join("state/io.containerd.runtime.v2.task/k8s.io")
        .join(&id);
    let program = fs::read_to_string(bundle.join("shim-binary-path"))?;
    ensure!(
        Path::new(&program) == stage.binary("containerd-shim-embed-v1"),
        "{program}"
    );
    // Nor has a launcher said where its events go.
    let note: serde_json::Value =
        serde_json::from_slice(&fs::read(bundle.join("embedshim.json"))?)?;
    let events = sandbox.directory().join("c.sock.ttrpc");
    ensure!(note["events"] == *events.to_string_lossy(), "{note}");
    until("the events of its start are delivered", || {
        Ok(fs::read_dir(sandbox.state_dir().join("events"))?.count() == 0)
    })?;
    // containerd cannot connect to it when it starts.
    sandbox.stop_containerd()?;
    fs::write(bundle.join("bootstrap.json"), UNREACHABLE)?;
    sandbox.start_containerd()?;
    let mut cri = Cri::connect(&sandbox)?;
    let end = ended(&mut cri, &id)?;
    ensure!(end.0 != 0, "{end:?}");
    let log = sandbox.daemon_log();
    ensure!(
        log.contains("cleaned up: containerd has given it up"),
        "{log}"
    );
    cri.remove_pod(&pod)
}

/// An address on which nothing listens.
const UNREACHABLE: &str =
    r#"{"version":3,"address":"unix:///nonexistent/shim.sock","protocol":"ttrpc"}"#;

//! Pods without a pause container whose containers share their processes or have users of their
//! own. Of the first, one process is ours: the init of their pid namespace, which must be good for
//! nothing else. The second need an OCI runtime of 1.2 or later: Debian's runc 1.3.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use embedshim_tests::{Cri, Footprint, Namespaces, Pod, Stage, Test};
use k8s_cri::v1::NamespaceMode;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::releases;
use testbed::sandbox::{Sandbox, is_alive, until};

use crate::kubernetes::{LONG, ended};
use crate::pods::{Frozen, HANDLER, OWN_NETWORK, end, seen, with_pods, with_prepared};
use crate::tests;
use crate::user_namespaces::{MAPPED, life_with};

pub(crate) const TESTS: [Test; 8] = tests!(ContainerdTwo:
    the_init_of_a_pod_has_no_rights_and_shows_nothing_of_the_host,
    the_init_of_a_pod_reaps_and_cannot_be_killed_from_inside,
    a_pod_with_an_init_outlives_the_daemon_and_containerd,
    a_pod_whose_init_is_killed_has_ended,
    a_pod_whose_processes_do_not_end_holds_up_no_daemon_and_is_finished_later,
    a_pod_is_made_in_no_mount_of_cgroups_that_is_there_for_a_while,
    a_pod_with_users_of_its_own_lives_without_a_pause_container,
    a_pod_with_users_and_shared_processes_has_an_init_of_its_users,
);

/// A pod with its own network, whose containers share their processes.
pub(crate) const SHARED_PROCESSES: Namespaces = Namespaces {
    pid: NamespaceMode::Pod,
    ..OWN_NETWORK
};

pub(crate) fn record_of(sandbox: &Sandbox, pod: &Pod) -> PathBuf {
    let name = format!("sandboxes/k8s.io:{}.json", pod.id);
    sandbox.state_dir().join(name)
}

/// The node's number of a pod's init.
pub(crate) fn init_of(sandbox: &Sandbox, pod: &Pod) -> anyhow::Result<i32> {
    let text = fs::read_to_string(record_of(sandbox, pod))?;
    let record: serde_json::Value = serde_json::from_str(&text)?;
    let pid = record.pointer("/init/identity/pid");
    let pid = pid.and_then(serde_json::Value::as_i64).context("no init")?;
    Ok(i32::try_from(pid)?)
}

/// A field of `/proc/PID/status`.
fn field(pid: i32, name: &str) -> anyhow::Result<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let value = line.and_then(|line| line.strip_prefix(':'));
    Ok(value
        .with_context(|| format!("no {name}"))?
        .trim()
        .to_owned())
}

fn the_init_of_a_pod_has_no_rights_and_shows_nothing_of_the_host(
    stage: &Stage,
) -> anyhow::Result<()> {
    let Some((sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let pod = cri.run_pod("pod", HANDLER, SHARED_PROCESSES)?;
    let init = init_of(&sandbox, &pod)?;
    let nobody = "65535\t65535\t65535\t65535";
    for (name, expected) in [
        ("Name", "embedshim-pod"),
        ("Uid", nobody),
        ("Gid", nobody),
        ("Groups", ""),
        ("CapPrm", "0000000000000000"),
        ("CapEff", "0000000000000000"),
        ("CapBnd", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
        ("Threads", "1"),
    ] {
        let found = field(init, name)?;
        ensure!(found == expected, "{name}: {found:?}");
    }
    ensure!(
        fs::read_dir(format!("/proc/{init}/fd"))?.count() == 0,
        "it has descriptors"
    );
    let cgroups = fs::read_to_string(format!("/proc/{init}/cgroup"))?;
    ensure!(cgroups.contains(&pod.id), "{cgroups}");
    let memory = field(init, "VmRSS")?;
    let kilobytes: u64 = memory.split(' ').next().context("no number")?.parse()?;
    ensure!(kilobytes <= 64, "{memory}");
    // A neighbour that may trace everything and mount.
    let rights = ["SYS_PTRACE", "SYS_ADMIN", "DAC_READ_SEARCH", "SYS_CHROOT"];
    let id = cri.run_capable(&pod, "c", &rights, &["sleep", "1000"])?;
    let looks = "busybox ls -A /proc/1/root /proc/1/root/.. /proc/1/root/../.. /proc/1/cwd \
                 /proc/1/cwd/../.. | busybox grep -v -e : -e '^$'; \
                 busybox cat /proc/1/mountinfo | busybox wc -l; \
                 busybox cat /proc/1/net/dev | busybox grep -c : ";
    let found = cri.exec(&id, &["sh", "-c", looks], LONG)?.stdout;
    // One mount, which is empty; the loop-back interface and the pod's.
    ensure!(found == "1\n2\n", "{found}");
    let changes = "echo x > /proc/1/exe; busybox cp /bin/busybox /proc/1/exe; \
                   busybox mkdir /proc/1/root/x; echo 1 > /proc/1/mem";
    let tried = cri.exec(&id, &["sh", "-c", changes], LONG)?;
    ensure!(tried.code != 0, "{tried:?}");
    ensure!(is_alive(init), "it is dead");
    cri.remove_pod(&pod)
}

fn the_init_of_a_pod_reaps_and_cannot_be_killed_from_inside(stage: &Stage) -> anyhow::Result<()> {
    let Some((sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let first = cri.run_pod("first", HANDLER, SHARED_PROCESSES)?;
    let before = Footprint::of(&sandbox);
    let pod = cri.run_pod("pod", HANDLER, SHARED_PROCESSES)?;
    let init = init_of(&sandbox, &pod)?;
    let one = cri.run_container(&pod, "one", 0, &["guest", "until-term", "33"])?;
    let two = cri.run_container(&pod, "two", 0, &["sleep", "1000"])?;
    // Its parent ends first.
    seen(&mut cri, &one, "sleep 0.2 > /dev/null 2>&1 &")?;
    let children = format!("/proc/{init}/task/{init}/children");
    until("the orphan is reaped", || {
        Ok(fs::read_to_string(&children)?.trim().is_empty())
    })?;
    for signal in ["KILL", "TERM", "INT", "STOP"] {
        seen(&mut cri, &one, &format!("kill -{signal} 1"))?;
    }
    ensure!(
        field(init, "State")?.starts_with('S'),
        "{}",
        field(init, "State")?
    );
    // Another container's processes can be ended; each container's end is its own.
    seen(&mut cri, &one, "kill -KILL $(busybox pidof sleep)")?;
    let end_of_two = ended(&mut cri, &two)?;
    ensure!(end_of_two.0 == 137, "{end_of_two:?}");
    end(&mut cri, &pod, &one)?;
    ensure!(!is_alive(init), "the init lives on");
    before.wait_for_return(&sandbox)?;
    cri.remove_pod(&first)
}

fn a_pod_with_an_init_outlives_the_daemon_and_containerd(stage: &Stage) -> anyhow::Result<()> {
    let Some((mut sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let first = cri.run_pod("first", HANDLER, SHARED_PROCESSES)?;
    let before = Footprint::of(&sandbox);
    let other = cri.run_pod("other", HANDLER, SHARED_PROCESSES)?;
    let pod = cri.run_pod("pod", HANDLER, SHARED_PROCESSES)?;
    let init = init_of(&sandbox, &pod)?;
    let one = cri.run_container(&pod, "one", 0, &["guest", "until-term", "33"])?;
    sandbox.kill_daemon()?;
    sandbox.kill_containerd()?;
    sandbox.kill_daemon()?;
    sandbox.start_containerd()?;
    let mut cri = Cri::connect(&sandbox)?;
    ensure!(cri.is_ready(&pod)? == (true, true), "not ready");
    let two = cri.run_container(&pod, "two", 0, &["sleep", "1000"])?;
    let processes = seen(&mut cri, &two, "ps")?;
    for expected in ["embedshim-pod", "until-term 33", "sleep 1000"] {
        ensure!(processes.contains(expected), "{processes}");
    }
    ensure!(init_of(&sandbox, &pod)? == init, "another init");
    // The new daemon watches it, too.
    kill(Pid::from_raw(init_of(&sandbox, &other)?), Signal::SIGKILL)?;
    until("the other pod has ended", || {
        Ok(cri.is_ready(&other).is_ok_and(|is| is == (false, false)))
    })?;
    cri.remove_pod(&other)?;
    end(&mut cri, &pod, &one)?;
    before.wait_for_return(&sandbox)?;
    cri.remove_pod(&first)
}

/// By the OOM killer, by an administrator: the kernel kills all of the pod's processes then.
fn a_pod_whose_init_is_killed_has_ended(stage: &Stage) -> anyhow::Result<()> {
    let Some((sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let first = cri.run_pod("first", HANDLER, SHARED_PROCESSES)?;
    let before = Footprint::of(&sandbox);
    for is_daemon_there in [true, false] {
        let pod = cri.run_pod("pod", HANDLER, SHARED_PROCESSES)?;
        let init = Pid::from_raw(init_of(&sandbox, &pod)?);
        if is_daemon_there {
            let id = cri.run_container(&pod, "c", 0, &["sleep", "1000"])?;
            kill(init, Signal::SIGKILL)?;
            let end = ended(&mut cri, &id)?;
            ensure!(end.0 == 137, "{end:?}");
        } else {
            sandbox.end_daemon(Signal::SIGKILL)?;
            kill(init, Signal::SIGKILL)?;
            sandbox.start_daemon()?;
        }
        until("the pod has ended", || {
            Ok(cri.is_ready(&pod).is_ok_and(|is| is == (false, false)))
        })?;
        cri.run_container(&pod, "late", 0, &["true"]).unwrap_err();
        until("the pod is removed", || Ok(cri.remove_pod(&pod).is_ok()))?;
        before.wait_for_return(&sandbox)?;
    }
    cri.remove_pod(&first)
}

/// Its containers' processes are frozen; an init that was killed ends after all others.
fn a_pod_whose_processes_do_not_end_holds_up_no_daemon_and_is_finished_later(
    stage: &Stage,
) -> anyhow::Result<()> {
    let Some((sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let first = cri.run_pod("first", HANDLER, SHARED_PROCESSES)?;
    let before = Footprint::of(&sandbox);
    for phase in ["stopping", "removing"] {
        let pod = cri.run_pod("pod", HANDLER, SHARED_PROCESSES)?;
        let id = cri.run_container(&pod, "c", 0, &["sleep", "1000"])?;
        let frozen = Frozen::freeze(&sandbox, &id)?;
        // As a daemon leaves it that dies within.
        let record = record_of(&sandbox, &pod);
        let text = fs::read_to_string(&record)?;
        fs::write(&record, text.replace("\"ready\"", &format!("\"{phase}\"")))?;
        sandbox.kill_daemon()?;
        let log = sandbox.daemon_log();
        ensure!(
            !log.contains("cannot finish what a predecessor"),
            "it has waited: {log}"
        );
        until("the other pod is ready", || {
            Ok(cri.is_ready(&first).is_ok_and(|is| is == (true, true)))
        })?;
        ensure!(record.exists(), "it is forgotten");
        frozen.thaw()?;
        until("the pod is removed", || Ok(cri.remove_pod(&pod).is_ok()))?;
        before.wait_for_return(&sandbox)?;
    }
    cri.remove_pod(&first)
}

/// As CRIU mounts all hierarchies in the bundle of a container that it restores.
fn a_pod_is_made_in_no_mount_of_cgroups_that_is_there_for_a_while(
    stage: &Stage,
) -> anyhow::Result<()> {
    let Some((sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let again = CgroupsAgain::mount(sandbox.directory().join("cgroups"))?;
    // Only now it looks where they are.
    sandbox.kill_daemon()?;
    let first = cri.run_pod("first", HANDLER, SHARED_PROCESSES)?;
    let directory = again.unmount()?;
    let before = Footprint::of(&sandbox);
    let pod = cri.run_pod("pod", HANDLER, SHARED_PROCESSES)?;
    let made = fs::read_dir(&directory)?.count();
    ensure!(made == 0, "{made} were made where no cgroup is");
    cri.remove_pod(&pod)?;
    before.wait_for_return(&sandbox)?;
    cri.remove_pod(&first)?;
    Ok(fs::remove_dir(directory)?)
}

/// All hierarchies of the machine, mounted a second time.
struct CgroupsAgain(PathBuf);

impl CgroupsAgain {
    fn mount(directory: PathBuf) -> anyhow::Result<Self> {
        fs::create_dir(&directory)?;
        let mounted = Self(directory);
        let (from, none) = (Some("/sys/fs/cgroup"), None::<&str>);
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(from, &mounted.0, none, flags, none)?;
        let flags = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(none, &mounted.0, none, flags, none)?;
        Ok(mounted)
    }

    fn unmount(self) -> anyhow::Result<PathBuf> {
        umount2(&self.0, MntFlags::MNT_DETACH)?;
        Ok(self.0.clone())
    }
}

impl Drop for CgroupsAgain {
    fn drop(&mut self) {
        // Not there, usually.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// With an OCI runtime that can map the owners of mounts.
fn with_newer_runc(stage: &Stage) -> anyhow::Result<Option<(Sandbox, Cri)>> {
    with_prepared(stage, |sandbox| {
        sandbox.use_oci_runtime(releases::runc()?.join("runc"));
        Ok(())
    })
}

fn a_pod_with_users_of_its_own_lives_without_a_pause_container(
    stage: &Stage,
) -> anyhow::Result<()> {
    with_newer_runc(stage)?.map_or(Ok(()), |(sandbox, mut cri)| {
        life_with(&sandbox, &mut cri, HANDLER, MAPPED)
    })
}

fn a_pod_with_users_and_shared_processes_has_an_init_of_its_users(
    stage: &Stage,
) -> anyhow::Result<()> {
    let Some((sandbox, mut cri)) = with_newer_runc(stage)? else {
        return Ok(());
    };
    let namespaces = Namespaces {
        pid: NamespaceMode::Pod,
        ..MAPPED
    };
    let pod = cri.run_pod_with("users", HANDLER, namespaces, |config| {
        config.hostname = "web-0".into();
        let linux = config.linux.get_or_insert_default();
        linux.sysctls = [
            ("kernel.msgmax".to_owned(), "16384".to_owned()),
            (
                "net.ipv4.ip_local_port_range".to_owned(),
                "2000 3000".to_owned(),
            ),
        ]
        .into();
    })?;
    let init = init_of(&sandbox, &pod)?;
    let users = MAPPED.users.context("no users")?;
    let own = (users + 65_535).to_string();
    ensure!(
        field(init, "Uid")?.starts_with(&own),
        "{}",
        field(init, "Uid")?
    );
    let id = cri.run_container(&pod, "c", 0, &["sleep", "1000"])?;
    let script = "busybox hostname; cat /proc/sys/kernel/msgmax \
                  /proc/sys/net/ipv4/ip_local_port_range; echo x > /dev/shm/x && cat /dev/shm/x";
    let found = seen(&mut cri, &id, script)?;
    ensure!(found == "web-0\n16384\n2000\t3000\nx\n", "{found:?}");
    cri.remove_pod(&pod)?;
    life_with(&sandbox, &mut cri, HANDLER, namespaces)
}

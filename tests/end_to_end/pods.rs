//! Pods without a pause container: the daemon as containerd's sandbox controller, through the CRI.
//! containerd has proxies for sandbox controllers from 2.0 on; with an older one there is nothing
//! to test.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, ensure};
use embedshim_tests::{Controller, Cri, Footprint, Namespaces, Pod, Stage, Test};
use k8s_cri::v1::{DnsConfig, NamespaceMode};
use serde_json::Value;
use testbed::sandbox::{Sandbox, until};

use crate::kubernetes::{LONG, ended};
use crate::tests;

pub(crate) const TESTS: [Test; 6] = tests!(ContainerdTwo:
    a_pod_has_no_process_and_everything_that_containers_share,
    a_pod_has_its_own_network_and_name,
    what_a_pod_cannot_have_is_refused_by_name,
    what_others_have_put_into_the_cris_directories_is_not_touched,
    thousands_of_waits_hold_up_nothing,
    the_answer_to_a_start_names_what_containers_share,
);

pub(crate) const HANDLER: &str = "pauseless";

pub(crate) const OWN_NETWORK: Namespaces = Namespaces {
    network: NamespaceMode::Pod,
    ..Namespaces::SIMPLE
};

/// A daemon that is a sandbox controller, and a containerd that uses it; `None` if this containerd
/// cannot.
pub(crate) fn with_pods(stage: &Stage) -> anyhow::Result<Option<(Sandbox, Cri)>> {
    with_prepared(stage, |_| Ok(()))
}

/// The same, in a sandbox that is prepared before anything is started in it.
pub(crate) fn with_prepared(
    stage: &Stage,
    prepare: impl FnOnce(&mut Sandbox) -> anyhow::Result<()>,
) -> anyhow::Result<Option<(Sandbox, Cri)>> {
    let mut sandbox = stage.bare_sandbox()?;
    prepare(&mut sandbox)?;
    sandbox.enable_sandboxer()?;
    sandbox.start_daemon()?;
    sandbox.start_containerd()?;
    if is_too_old(&sandbox)? {
        return Ok(None);
    }
    sandbox.import_for_kubernetes(stage.archive())?;
    let cri = Cri::connect(&sandbox)?;
    Ok(Some((sandbox, cri)))
}

fn is_too_old(sandbox: &Sandbox) -> anyhow::Result<bool> {
    let versions = sandbox.ctr_ok(&["version"])?;
    let mut lines = versions.lines().map(str::trim);
    let server = lines.rfind(|line| line.starts_with("Version:"));
    let server = server.context("no version")?;
    Ok(server.contains(" 1.") || server.contains(" v1."))
}

/// Every process whose command line or environment names the sandbox's directory, but containerd
/// and ours.
fn pauses(sandbox: &Sandbox) -> anyhow::Result<Vec<String>> {
    let ours = [sandbox.daemon_pid(), sandbox.keeper_pid()];
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        let needle = sandbox.directory().to_string_lossy().into_owned();
        let is_ours = ours.contains(&Some(pid)) || line.contains("containerd --config");
        let is_of_sandbox =
            line.contains(&needle) || String::from_utf8_lossy(&environment).contains(&needle);
        if is_of_sandbox && !is_ours && pid != i32::try_from(std::process::id())? {
            found.push(format!("{pid} {line}"));
        }
    }
    Ok(found)
}

pub(crate) fn seen(cri: &mut Cri, id: &str, script: &str) -> anyhow::Result<String> {
    let executed = cri.exec(id, &["sh", "-c", script], LONG)?;
    ensure!(executed.code == 0, "{script}: {executed:?}");
    Ok(executed.stdout)
}

fn a_pod_has_no_process_and_everything_that_containers_share(stage: &Stage) -> anyhow::Result<()> {
    let Some((sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let plugins = sandbox.ctr_ok(&["plugins", "ls"])?;
    let mut plugins = plugins.lines().map(str::split_whitespace);
    let is_listed = plugins.any(|mut words| {
        words.next() == Some("io.containerd.sandbox.controller.v1") && words.next() == Some("embed")
    });
    ensure!(is_listed, "containerd does not list the controller");
    let first = cri.run_pod("first", HANDLER, Namespaces::SIMPLE)?;
    let before = Footprint::of(&sandbox);
    let pod = cri.run_pod_with("pod", HANDLER, Namespaces::SIMPLE, |config| {
        config.dns_config = Some(DnsConfig {
            servers: vec!["192.0.2.53".into()],
            searches: vec!["svc.example".into()],
            options: vec!["ndots:5".into()],
        });
        let linux = config.linux.get_or_insert_default();
        linux.sysctls = [("kernel.msgmax".to_owned(), "16384".to_owned())].into();
    })?;
    let processes = pauses(&sandbox)?;
    ensure!(processes.is_empty(), "{processes:?}");
    ensure!(cri.is_ready(&pod)? == (true, true), "not ready");
    let one = cri.run_container(&pod, "one", 0, &["guest", "until-term", "33"])?;
    let two = cri.run_container(&pod, "two", 0, &["sleep", "1000"])?;
    let name = nix::unistd::gethostname()?.to_string_lossy().into_owned();
    ensure!(
        seen(&mut cri, &one, "cat /etc/hostname; busybox hostname")? == format!("{name}\n{name}\n"),
        "another name"
    );
    let resolv = seen(&mut cri, &one, "cat /etc/resolv.conf")?;
    let expected = "search svc.example\nnameserver 192.0.2.53\noptions ndots:5\n";
    ensure!(resolv == expected, "{resolv}");
    let hosts = seen(&mut cri, &one, "cat /etc/hosts")?;
    ensure!(hosts == fs::read_to_string("/etc/hosts")?, "{hosts}");
    // Memory and ipc are the pod's, not the node's and not each container's.
    seen(&mut cri, &one, "echo shared > /dev/shm/x")?;
    ensure!(
        seen(&mut cri, &two, "cat /dev/shm/x")? == "shared\n",
        "not shared"
    );
    let size = seen(&mut cri, &two, "busybox df -k /dev/shm | busybox tail -1")?;
    ensure!(size.contains(" 65536 "), "{size}");
    ensure!(!Path::new("/dev/shm/x").exists(), "it is the node's");
    let sysctl = "cat /proc/sys/kernel/msgmax";
    ensure!(seen(&mut cri, &two, sysctl)? == "16384\n", "no sysctl");
    ensure!(
        fs::read_to_string("/proc/sys/kernel/msgmax")? != "16384\n",
        "it is the node's"
    );
    end(&mut cri, &pod, &one)?;
    before.wait_for_return(&sandbox)?;
    cri.remove_pod(&first)
}

/// Stops the container that ends with 33, and removes the pod.
pub(crate) fn end(cri: &mut Cri, pod: &Pod, id: &str) -> anyhow::Result<()> {
    cri.stop(id, LONG)?;
    let end = ended(cri, id)?;
    ensure!(end == (33, "Error".into()), "{end:?}");
    cri.stop_pod(pod)?;
    ensure!(cri.is_ready(pod)? == (false, false), "it is ready");
    cri.stop_pod(pod)?;
    cri.remove_pod(pod)
}

fn a_pod_has_its_own_network_and_name(stage: &Stage) -> anyhow::Result<()> {
    let Some((sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let first = cri.run_pod("first", HANDLER, Namespaces::SIMPLE)?;
    let before = Footprint::of(&sandbox);
    let pod = cri.run_pod_with("pod", HANDLER, OWN_NETWORK, |config| {
        config.hostname = "web-0".into();
        let linux = config.linux.get_or_insert_default();
        linux.sysctls = [(
            "net.ipv4.ip_local_port_range".to_owned(),
            "2000 3000".to_owned(),
        )]
        .into();
    })?;
    let address = cri.address(&pod)?;
    ensure!(address.starts_with("192.0.2."), "{address}");
    let id = cri.run_container(&pod, "c", 0, &["guest", "until-term", "33"])?;
    let names = seen(&mut cri, &id, "cat /etc/hostname; busybox hostname")?;
    ensure!(names == "web-0\nweb-0\n", "{names}");
    let interface = seen(&mut cri, &id, "busybox ip -4 addr show eth0")?;
    ensure!(
        interface.contains(&format!("inet {address}/")),
        "{interface}"
    );
    let sysctls = "cd /proc/sys/net/ipv4; cat ip_local_port_range ip_unprivileged_port_start ping_group_range";
    let sysctls = seen(&mut cri, &id, sysctls)?;
    ensure!(sysctls == "2000\t3000\n0\n0\t2147483647\n", "{sysctls:?}");
    end(&mut cri, &pod, &id)?;
    before.wait_for_return(&sandbox)?;
    cri.remove_pod(&first)
}

fn what_a_pod_cannot_have_is_refused_by_name(stage: &Stage) -> anyhow::Result<()> {
    let Some((sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let first = cri.run_pod("first", HANDLER, Namespaces::SIMPLE)?;
    let before = Footprint::of(&sandbox);
    for sysctl in ["kernel.core_pattern", "net.ipv4.ip_forward"] {
        let refused = cri.run_pod_with("sysctl", HANDLER, Namespaces::SIMPLE, |config| {
            let linux = config.linux.get_or_insert_default();
            linux.sysctls = [(sysctl.to_owned(), "x".to_owned())].into();
        });
        let refused = format!("{:#}", refused.unwrap_err());
        ensure!(refused.contains(sysctl), "{refused}");
    }
    // A step that fails after others: the kernel refuses the value.
    let refused = cri.run_pod_with("value", HANDLER, Namespaces::SIMPLE, |config| {
        let linux = config.linux.get_or_insert_default();
        linux.sysctls = [("kernel.msgmax".to_owned(), "much".to_owned())].into();
    });
    let refused = format!("{:#}", refused.unwrap_err());
    ensure!(refused.contains("msgmax"), "{refused}");
    before.wait_for_return(&sandbox)?;
    cri.remove_pod(&first)
}

/// Links and files where a pod's links are made: another program's, or an attacker's.
fn what_others_have_put_into_the_cris_directories_is_not_touched(
    stage: &Stage,
) -> anyhow::Result<()> {
    let Some((sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let first = cri.run_pod("first", HANDLER, Namespaces::SIMPLE)?;
    let root = sandbox.directory().join("root/io.containerd.grpc.v1.cri");
    let links = root.join("sandboxes");
    let other = sandbox.directory().join("other");
    fs::create_dir(&other)?;
    symlink(&other, links.join("foreign"))?;
    fs::write(links.join("file"), "x")?;
    // The directory of links itself leads elsewhere.
    fs::rename(&links, root.join("moved"))?;
    symlink(&other, &links)?;
    let refused = cri.run_pod("pod", HANDLER, Namespaces::SIMPLE).unwrap_err();
    ensure!(
        format!("{refused:#}").contains("cannot link"),
        "{refused:#}"
    );
    ensure!(fs::read_dir(&other)?.count() == 0, "it was followed");
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let pods = sandbox.state_dir().join("pods/k8s.io");
    let of_pods = mounts.matches(&*pods.to_string_lossy()).count();
    // Of the first.
    ensure!(of_pods == 2, "{mounts}");
    fs::remove_file(&links)?;
    fs::rename(root.join("moved"), &links)?;
    sandbox.kill_daemon()?;
    until("the pod is removed", || Ok(cri.remove_pod(&first).is_ok()))?;
    ensure!(
        links.join("foreign").is_symlink(),
        "a link of others is gone"
    );
    ensure!(links.join("file").is_file(), "a file of others is gone");
    Ok(())
}

/// Each `Wait` is a stream of the one connection.
fn thousands_of_waits_hold_up_nothing(stage: &Stage) -> anyhow::Result<()> {
    let Some((sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let pod = cri.run_pod("pod", HANDLER, Namespaces::SIMPLE)?;
    let socket = sandbox.state_dir().join("pods.sock");
    let mut controller = Controller::connect(&socket)?;
    controller.begin_waits(&pod.id, 10_000)?;
    let began = Instant::now();
    ensure!(cri.is_ready(&pod)? == (true, true), "not ready");
    let again = cri.run_pod("again", HANDLER, Namespaces::SIMPLE)?;
    ensure!(began.elapsed() < LONG, "{:?}", began.elapsed());
    cri.remove_pod(&again)?;
    cri.stop_pod(&pod)?;
    controller.finish_waits()?;
    // What is no request is refused and changes nothing.
    for bad in ["../../etc", "a/b", "", "."] {
        let refused = controller.create(bad, "runtime.v1.PodSandboxConfig", b"");
        ensure!(refused == Some(tonic::Code::InvalidArgument), "{refused:?}");
    }
    let refused = controller.create("x", "something.Else", b"");
    ensure!(refused == Some(tonic::Code::InvalidArgument), "{refused:?}");
    let refused = controller.create("x", "runtime.v1.PodSandboxConfig", &vec![0xff; 1 << 22]);
    ensure!(refused == Some(tonic::Code::InvalidArgument), "{refused:?}");
    cri.remove_pod(&pod)
}

/// For a containerd that makes containers by it; that of today writes paths of process 0.
fn the_answer_to_a_start_names_what_containers_share(stage: &Stage) -> anyhow::Result<()> {
    let Some((sandbox, mut cri)) = with_pods(stage)? else {
        return Ok(());
    };
    let pod = cri.run_pod("pod", HANDLER, OWN_NETWORK)?;
    let mut controller = Controller::connect(&sandbox.state_dir().join("pods.sock"))?;
    let answer = controller.start(&pod.id)?;
    // The last field.
    let (begin, end) = (b"{\"linux\"", b"}");
    let begin = answer.windows(begin.len()).position(|bytes| bytes == begin);
    let end = answer.windows(end.len()).rposition(|bytes| bytes == end);
    let json = answer.get(begin.context("no spec")?..=end.context("no end")?);
    let spec: Value = serde_json::from_slice(json.context("no spec")?)?;
    let list = |pointer: &str| spec.pointer(pointer).and_then(Value::as_array).cloned();
    let namespaces = list("/linux/namespaces").context("no namespaces")?;
    let kinds: Vec<&str> = namespaces
        .iter()
        .filter_map(|one| one["type"].as_str())
        .collect();
    ensure!(kinds == ["network", "ipc", "uts", "pid"], "{spec}");
    let paths = namespaces.iter().filter_map(|one| one["path"].as_str());
    let mounts = list("/mounts").context("no mounts")?;
    let sources = mounts.iter().filter_map(|one| one["source"].as_str());
    for path in paths.chain(sources) {
        ensure!(Path::new(path).exists(), "{path} is not there");
    }
    ensure!(mounts.len() == 4, "{spec}");
    cri.remove_pod(&pod)
}

/// A container that its cgroup's freezer holds.
pub(crate) struct Frozen {
    file: PathBuf,
    words: [&'static str; 2],
}

impl Frozen {
    pub(crate) fn freeze(sandbox: &Sandbox, id: &str) -> anyhow::Result<Self> {
        let cgroup = format!("{}/{id}", sandbox.namespace());
        let [v1, v2] = ["freezer", ""].map(|controller| {
            PathBuf::from("/sys/fs/cgroup")
                .join(controller)
                .join(&cgroup)
        });
        let frozen = if v1.is_dir() {
            let file = v1.join("freezer.state");
            let words = ["FROZEN", "THAWED"];
            Self { file, words }
        } else {
            let file = v2.join("cgroup.freeze");
            let words = ["1", "0"];
            Self { file, words }
        };
        frozen.put(0)?;
        Ok(frozen)
    }

    fn put(&self, word: usize) -> anyhow::Result<()> {
        let word = self.words.get(word).context("no such word")?;
        fs::write(&self.file, word).with_context(|| self.file.display().to_string())
    }

    pub(crate) fn thaw(&self) -> anyhow::Result<()> {
        self.put(1)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = self.thaw();
    }
}

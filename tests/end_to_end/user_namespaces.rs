//! What kubelet is offered of an OCI runtime that can do more than Debian 12's: pods with user
//! namespaces, and mounts that are read-only with all below them. By Debian's runc 1.3, beside the
//! installed one, and containerd from 1.7 on: 1.6 knows of neither.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use embedshim_tests::{Cri, Footprint, Namespaces, Stage, Test};
use k8s_cri::v1::NamespaceMode;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use testbed::releases::{self, Release};
use testbed::sandbox::{Sandbox, until};

use crate::kubernetes::{LONG, ended};
use crate::tests;

pub(crate) const TESTS: [Test; 6] = tests!(OtherContainerd:
    a_pod_with_a_user_namespace_lives_with_runc_v2s_type_and_our_path,
    a_pod_with_a_user_namespace_lives_with_runc_v2_itself,
    a_pod_with_a_user_namespace_lives_with_our_own_type_without_options,
    containerd_2_starts_no_container_in_a_user_namespace_with_options_of_our_own_type,
    a_read_only_mount_is_read_only_with_all_below_it,
    kubelet_is_offered_what_the_runtime_can_do,
);

/// The host's first user of the pods.
const USERS: u32 = 200_000;

/// A pod with its own users and network. The host's network cannot be in a user namespace's hands.
pub(crate) const MAPPED: Namespaces = Namespaces {
    network: NamespaceMode::Pod,
    pid: NamespaceMode::Container,
    users: Some(USERS),
};

/// How the handlers find the OCI runtime.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    /// By an option.
    BinaryName,
    /// By the `PATH` of containerd.
    Path,
}

fn with_cri(stage: &Stage, by: By) -> anyhow::Result<(Sandbox, Cri)> {
    let mut sandbox = stage.bare_sandbox()?;
    let runc = releases::runc()?.join("runc");
    // Also that of runc-v2.
    let shims = sandbox.directory().join("shims");
    fs::create_dir(&shims)?;
    if let Some(programs) = stage.programs() {
        // A release's is a script, which does not find itself again.
        let of_release = Release::of(Some(&programs)).and_then(Release::runc_v2);
        let shim = of_release.unwrap_or_else(|| programs.join("containerd-shim-runc-v2"));
        symlink(shim, shims.join("containerd-shim-runc-v2"))?;
    }
    match by {
        By::BinaryName => sandbox.use_oci_runtime(runc),
        By::Path => symlink(runc, shims.join("runc"))?,
    }
    sandbox.use_shims(shims);
    sandbox.enable_cri()?;
    sandbox.start_containerd()?;
    sandbox.import_for_kubernetes(stage.archive())?;
    let cri = Cri::connect(&sandbox)?;
    Ok((sandbox, cri))
}

/// Whether this containerd asks runtimes what they can do, and tells kubelet: from 2.0 on.
fn is_asking(cri: &mut Cri) -> anyhow::Result<bool> {
    Ok(cri.features("runc-v2")?.is_some())
}

/// The life of a pod with a user namespace, beside another one.
fn life(stage: &Stage, handler: &str, by: By) -> anyhow::Result<()> {
    let (sandbox, mut cri) = with_cri(stage, by)?;
    life_with(&sandbox, &mut cri, handler, MAPPED)
}

pub(crate) fn life_with(
    sandbox: &Sandbox,
    cri: &mut Cri,
    handler: &str,
    namespaces: Namespaces,
) -> anyhow::Result<()> {
    let first = cri.run_pod("first", handler, namespaces)?;
    let before = Footprint::of(sandbox);
    let pod = cri.run_pod("pod", handler, namespaces)?;
    let script = "echo again 2>/dev/null >/dev/stdout; trap 'exit 33' TERM; echo ready; \
                  sleep 1000 & wait";
    let id = cri.run_container(&pod, "c", 0, &["sh", "-c", script])?;
    until("it is ready", || {
        Ok(cri.log("c", 0).contains("stdout F ready"))
    })
    .with_context(|| cri.log("c", 0))?;
    // From 2.0 on containerd says whose the outputs are, so that the pod's root can open them
    // again.
    let is_opened = cri.log("c", 0).contains("stdout F again");
    ensure!(is_opened == is_asking(cri)?, "{}", cri.log("c", 0));
    let seen = cri.exec(
        &id,
        &["sh", "-c", "busybox id -u; busybox cat /proc/self/uid_map"],
        LONG,
    )?;
    let words: Vec<&str> = seen.stdout.split_whitespace().collect();
    let users = USERS.to_string();
    ensure!(
        words == ["0", "0", users.as_str(), "65536"] && seen.code == 0,
        "{seen:?}"
    );
    ensure!(cri.memory(&id)? > 0, "no memory is used");
    if handler != "runc-v2" {
        sandbox.kill_daemon()?;
    }
    cri.stop(&id, LONG)?;
    let end = ended(cri, &id)?;
    ensure!(end == (33, "Error".into()), "{end:?}");
    cri.remove(&id)?;
    cri.remove_pod(&pod)?;
    before.wait_for_return(sandbox)?;
    cri.remove_pod(&first)
}

fn a_pod_with_a_user_namespace_lives_with_runc_v2s_type_and_our_path(
    stage: &Stage,
) -> anyhow::Result<()> {
    life(stage, "path", By::BinaryName)
}

/// So the others ask for no more than containerd's own shim does here.
fn a_pod_with_a_user_namespace_lives_with_runc_v2_itself(stage: &Stage) -> anyhow::Result<()> {
    life(stage, "runc-v2", By::BinaryName)
}

/// Of a client that does not ask what is offered.
fn a_pod_with_a_user_namespace_lives_with_our_own_type_without_options(
    stage: &Stage,
) -> anyhow::Result<()> {
    life(stage, "embed", By::Path)
}

/// It looks for runc's options, to say whose the streams are, and finds those of another type.
fn containerd_2_starts_no_container_in_a_user_namespace_with_options_of_our_own_type(
    stage: &Stage,
) -> anyhow::Result<()> {
    let (sandbox, mut cri) = with_cri(stage, By::BinaryName)?;
    if !is_asking(&mut cri)? {
        drop((cri, sandbox));
        return life(stage, "embed", By::BinaryName);
    }
    let first = cri.run_pod("first", "embed", MAPPED)?;
    let before = Footprint::of(&sandbox);
    let pod = cri.run_pod("pod", "embed", MAPPED)?;
    let refusal = cri.run_container(&pod, "c", 0, &["true"]).err();
    let refusal = refusal.context("it runs")?.to_string();
    ensure!(
        refusal.contains("can't unmarshal type \\\"runtimeoptions.v1.Options\\\""),
        "{refusal}"
    );
    cri.remove_pod(&pod)?;
    before.wait_for_return(&sandbox)?;
    cri.remove_pod(&first)
}

/// A directory with another file system in it.
struct Volume {
    at: PathBuf,
}

impl Volume {
    fn mount(sandbox: &Sandbox, name: &str) -> anyhow::Result<Self> {
        let at = sandbox.directory().join(format!("volume-{name}"));
        let below = at.join("below");
        fs::create_dir_all(&below)?;
        let none = None::<&str>;
        mount(Some("below"), &below, Some("tmpfs"), MsFlags::empty(), none)?;
        Ok(Self { at })
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = umount2(&self.at.join("below"), MntFlags::MNT_DETACH);
    }
}

/// Before 2.0 containerd knows of the mount itself only. By our own type none is asked for: kubelet
/// does not, since it is not offered, and containerd 2.1.9 itself would fail (a nil pointer).
fn a_read_only_mount_is_read_only_with_all_below_it(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, mut cri) = with_cri(stage, By::BinaryName)?;
    let expected = if is_asking(&mut cri)? { 7 } else { 8 };
    for handler in ["path", "runc-v2"] {
        let pod = cri.run_pod(handler, handler, Namespaces::SIMPLE)?;
        let volume = Volume::mount(&sandbox, handler)?;
        let script = "busybox touch /v/a && exit 9; busybox touch /v/below/a && exit 8; exit 7";
        let id = cri.run_with_volume(&pod, "c", (&volume.at, "/v"), &["sh", "-c", script])?;
        let (code, _) = ended(&mut cri, &id)?;
        ensure!(code == expected, "{handler}: {code}");
        cri.remove_pod(&pod)?;
    }
    Ok(())
}

/// What README says of `runtime_type`.
fn version_of_containerd() -> Vec<u32> {
    let version = std::env::var("EMBEDSHIM_TEST_CONTAINERD").unwrap_or_default();
    version
        .split(['.', '-'])
        .map_while(|number| number.parse().ok())
        .collect()
}

/// By containerd 2.0 to 2.3.3 for the type of runc-v2 alone.
fn kubelet_is_offered_what_the_runtime_can_do(stage: &Stage) -> anyhow::Result<()> {
    let (_sandbox, mut cri) = with_cri(stage, By::BinaryName)?;
    let is_asking = is_asking(&mut cri)?;
    for (handler, is_offered) in [
        ("path", is_asking),
        ("runc-v2", is_asking),
        (
            "embed",
            is_asking && version_of_containerd() >= vec![2, 3, 4],
        ),
    ] {
        let features = cri.features(handler)?.unwrap_or_default();
        let (users, read_only) = (
            features.user_namespaces,
            features.recursive_read_only_mounts,
        );
        ensure!(
            (users, read_only) == (is_offered, is_offered),
            "{handler}: {features:?}"
        );
    }
    Ok(())
}

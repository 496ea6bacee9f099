//! What dockerd sends to a shim beside the container: options of a runtime, of a checkpoint.

use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};
use embedshim_tests::{Docker, DockerSetup, Stage, Test, runtime_path, runtime_type};
use serde_json::json;
use testbed::machine::find_on_path;
use testbed::releases;
use testbed::sandbox::{RUNC_V2, until};

use crate::tests;

pub(crate) const OURS: [Test; 1] = tests!(EmbedshimOnly:
    a_runtime_that_dockerd_configures_is_used_or_named,
);
/// In `cargo xtask test --clients`.
pub(crate) const IN_FULL: [Test; 1] =
    tests!(AnyRuntime: a_docker_container_goes_on_from_its_checkpoint);

/// dockerd sends `daemon.json`'s options with each container. 20.10 knows the path of an OCI
/// runtime only. Newer ones send `runtimeoptions.v1.Options` for a type that they do not know, in
/// which they leave out all but a `ConfigPath`.
fn a_runtime_that_dockerd_configures_is_used_or_named(stage: &Stage) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let write = |name: &str, runtime: &Path| {
        let file = directory.path().join(name);
        let text = format!("BinaryName = \"{}\"\n", runtime.display());
        fs::write(&file, text).map(|()| file)
    };
    let (runc, nosuch) = (
        find_on_path("runc").context("no runc")?,
        Path::new("/nosuch"),
    );
    let typed = |file: &Path| runtime_type(stage.runtime(), &json!({ "ConfigPath": file }));
    let engine = embedshim_tests::docker().context("no docker")?;
    let setup = DockerSetup::default();
    if engine.takes_types()? {
        let runtimes = [
            ("used", typed(&write("runc.toml", &runc)?)),
            ("named", typed(&write("nosuch.toml", nosuch)?)),
            ("unread", typed(nosuch)),
        ];
        let runtimes = &runtimes;
        used_or_named(stage, DockerSetup { runtimes, ..setup })?;
        // By the name of runc's shim it sends runc's options.
        let inline = |runtime: &Path| runtime_type(RUNC_V2, &json!({ "BinaryName": runtime }));
        let runtimes = &[("used", inline(&runc)), ("named", inline(nosuch))];
        used_or_named(
            stage,
            DockerSetup {
                runtimes,
                by_runcs_name: true,
                ..setup
            },
        )
    } else {
        let runtimes = &[
            ("used", runtime_path(&runc)),
            ("named", runtime_path(nosuch)),
        ];
        used_or_named(stage, DockerSetup { runtimes, ..setup })
    }
}

/// Runs a container by each of the runtimes. What cannot be used has to be named.
fn used_or_named(stage: &Stage, setup: DockerSetup<'_>) -> anyhow::Result<()> {
    let docker = Docker::start_with(stage, &setup)?;
    for (name, _) in setup.runtimes {
        let ran = docker.run(&["--rm", "--runtime", name], &["true"])?;
        if *name == "used" {
            ensure!(ran.code == Some(0), "{ran:?}");
        } else {
            let is_named = ran.stderr.contains("\"/nosuch\"") || ran.stderr.contains(" /nosuch");
            ensure!(ran.code == Some(125) && is_named, "{name}: {ran:?}");
        }
    }
    Ok(())
}

/// `docker checkpoint` is experimental and needs criu. From 23 on dockerd says to no shim but
/// runc's that the container is to end.
fn a_docker_container_goes_on_from_its_checkpoint(stage: &Stage) -> anyhow::Result<()> {
    let path = &[releases::criu()?];
    let setup = DockerSetup {
        path,
        by_runcs_name: true,
        ..DockerSetup::default()
    };
    let docker = Docker::start_with(stage, &setup)?;
    let script = "i=0; while :; do i=$((i+1)); echo $i >> /count; busybox usleep 20000; done";
    let options = ["--network", "host", "--security-opt", "seccomp=unconfined"];
    docker.detached("counts", &options, &["sh", "-c", script])?;
    let counted = || -> anyhow::Result<usize> {
        let directory = docker.sandbox().directory().join("count");
        let target = directory.display().to_string();
        docker.ok(&["cp", "counts:/count", &target])?;
        Ok(fs::read_to_string(directory)?.lines().count())
    };
    until("it counts", || Ok(counted().unwrap_or(0) > 5))?;
    docker.ok(&["checkpoint", "create", "counts", "one"])?;
    docker.wait_for_status("counts", "exited")?;
    let saved = counted()?;
    docker.ok(&["start", "--checkpoint", "one", "counts"])?;
    until("it goes on", || Ok(counted()? > saved))?;
    docker.ok(&["rm", "--force", "counts"])?;
    ensure!(saved > 0, "nothing was counted");
    Ok(())
}

//! What the daemon does without a process of runc. A container is as runc would have left it, to
//! `runc state` and `runc list` as well, and whatever is odd is runc's to do, in its words.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::scope;

use anyhow::{Context, ensure};
use containerd_shim_protos::api;

use embedshim_tests::{Bundle, Footprint, Shim, Stage, Test};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use testbed::sandbox::{Sandbox, until};

use crate::cut_short::refusal;
use crate::half_done::{join, start};
use crate::tests;

pub(crate) const TESTS: [Test; 10] = tests!(EmbedshimOnly:
    a_start_needs_no_process_of_runc,
    a_start_with_hooks_is_runcs,
    a_start_is_done_once_though_its_daemon_is_killed_in_it,
    a_start_that_another_has_done_is_refused_in_runcs_words,
    a_start_of_a_frozen_container_is_refused_in_runcs_words,
    two_starts_at_once_start_it_once,
    a_delete_needs_no_process_of_runc,
    a_delete_with_hooks_is_runcs,
    a_delete_of_a_busy_cgroup_is_runcs,
    an_ordinary_life_does_not_read_the_nodes_mounts,
);

/// One container, made by the installed runc.
struct Scene {
    sandbox: Sandbox,
    shim: Shim,
    before: Footprint,
    bundle: Bundle,
}

impl Scene {
    fn set(stage: &Stage, command: &[&str]) -> anyhow::Result<Self> {
        let (sandbox, shim) = start(stage)?;
        // The first container of a daemon asks runc for its version.
        let first = Bundle::new(&sandbox, "first", &["true"])?;
        shim.create("first", first.path())?;
        shim.start("first")?;
        shim.wait("first")?;
        shim.delete("first")?;
        let bundle = Bundle::new(&sandbox, "c", command)?;
        let before = Footprint::of(&sandbox);
        Ok(Self {
            sandbox,
            shim,
            before,
            bundle,
        })
    }

    fn create(&self) -> anyhow::Result<u32> {
        Ok(self.shim.create("c", self.bundle.path())?)
    }

    /// Whether runc was called by `call`: it opens its log in each call.
    fn calls_runc<T>(&self, call: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(bool, T)> {
        let log = self.bundle.path().join("log.json");
        let _ = fs::remove_file(&log);
        let result = call()?;
        Ok((log.exists(), result))
    }

    /// Its cgroups, one for each hierarchy.
    fn cgroups(&self) -> Vec<PathBuf> {
        let root = PathBuf::from("/sys/fs/cgroup");
        let entries = fs::read_dir(&root).into_iter().flatten().flatten();
        let own = Path::new(self.sandbox.namespace()).join("c");
        let hierarchies = entries.map(|entry| entry.path()).chain([root]);
        let all = hierarchies.map(|hierarchy| hierarchy.join(&own));
        all.filter(|cgroup| cgroup.is_dir()).collect()
    }

    fn root(&self) -> PathBuf {
        Path::new("/run/containerd/runc").join(self.sandbox.namespace())
    }

    fn runc(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut runc = Command::new("runc");
        let output = runc
            .arg("--root")
            .arg(self.root())
            .args(arguments)
            .output()?;
        let words = [output.stdout, output.stderr].concat();
        Ok(String::from_utf8_lossy(&words).into_owned())
    }

    /// What `runc state` and `runc list` say, which agree.
    fn status(&self) -> anyhow::Result<String> {
        let state: serde_json::Value = serde_json::from_str(&self.runc(&["state", "c"])?)?;
        let status = state["status"].as_str().context("no status")?.to_owned();
        let list = self.runc(&["list"])?;
        let line = list.lines().find(|line| line.starts_with("c "));
        ensure!(
            line.is_some_and(|line| line.contains(&status)),
            "{status}: {list}"
        );
        Ok(status)
    }

    fn end(&self) -> anyhow::Result<()> {
        self.shim.kill("c", Signal::SIGKILL)?;
        ensure!(self.shim.wait("c")? == 137, "not 137");
        ensure!(self.shim.delete("c")? == 137, "not 137");
        self.before.wait_for_return(&self.sandbox)
    }
}

fn a_start_needs_no_process_of_runc(stage: &Stage) -> anyhow::Result<()> {
    let scene = Scene::set(stage, &["sleep", "1000"])?;
    let pid = scene.create()?;
    ensure!(scene.status()? == "created", "{}", scene.status()?);
    let (is_called, started) = scene.calls_runc(|| Ok(scene.shim.start("c")?))?;
    ensure!(started == pid && !is_called, "runc was called");
    ensure!(scene.status()? == "running", "{}", scene.status()?);
    let again = refusal(scene.shim.start("c"))?;
    ensure!(again.contains("cannot start a running process"), "{again}");
    scene.end()
}

fn a_start_with_hooks_is_runcs(stage: &Stage) -> anyhow::Result<()> {
    let scene = Scene::set(stage, &["sleep", "1000"])?;
    for (kind, is_expected) in [
        ("poststart", true),
        ("poststop", false),
        ("prestart", false),
    ] {
        scene.bundle.edit(|spec| {
            spec["hooks"] = json!({ kind: [{"path": "/bin/true"}] });
        })?;
        scene.create()?;
        let (is_called, _) = scene.calls_runc(|| Ok(scene.shim.start("c")?))?;
        ensure!(
            is_called == is_expected,
            "{kind}: runc was called: {is_called}"
        );
        ensure!(scene.status()? == "running", "{}", scene.status()?);
        scene.end()?;
    }
    Ok(())
}

/// The init stands still, so that it is being started for as long as we like.
fn a_start_is_done_once_though_its_daemon_is_killed_in_it(stage: &Stage) -> anyhow::Result<()> {
    let scene = Scene::set(stage, &["sleep", "1000"])?;
    for is_long in [false, true] {
        let pid = scene.create()?;
        let init = Pid::from_raw(i32::try_from(pid)?);
        kill(init, Signal::SIGSTOP)?;
        let started = scope(|scope| {
            let request = scope.spawn(|| scene.shim.start("c"));
            let daemon = scene.sandbox.daemon_pid().context("no daemon")?;
            until("the fifo is open", || has_open(daemon, "exec.fifo"))?;
            let killed = scope.spawn(|| scene.sandbox.kill_daemon());
            if is_long {
                // The process that starts the init lets a successor begin.
                killed.join().ok().context("a thread panicked")??;
                kill(init, Signal::SIGCONT)?;
            } else {
                until("the daemon is gone", || {
                    Ok(scene.sandbox.daemon_pid() != Some(daemon))
                })?;
                kill(init, Signal::SIGCONT)?;
                killed.join().ok().context("a thread panicked")??;
            }
            join(request)
        })??;
        ensure!(started == pid, "another pid");
        let told = scene.shim.state("c")?.status.enum_value_or_default();
        ensure!(told == api::Status::RUNNING, "State tells {told:?}");
        ensure!(scene.status()? == "running", "{}", scene.status()?);
        scene.end()?;
    }
    Ok(())
}

fn has_open(pid: i32, name: &str) -> anyhow::Result<bool> {
    let links = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
    let mut targets = links.filter_map(|link| fs::read_link(link.path()).ok());
    Ok(targets.any(|target| target.ends_with(name)))
}

fn a_start_that_another_has_done_is_refused_in_runcs_words(stage: &Stage) -> anyhow::Result<()> {
    let scene = Scene::set(stage, &["sleep", "1000"])?;
    scene.create()?;
    let said = scene.runc(&["start", "c"])?;
    ensure!(said.is_empty(), "{said}");
    let told = refusal(scene.shim.start("c"))?;
    ensure!(
        told.contains("cannot start an already running container"),
        "{told}"
    );
    scene.end()
}

fn a_start_of_a_frozen_container_is_refused_in_runcs_words(stage: &Stage) -> anyhow::Result<()> {
    let scene = Scene::set(stage, &["sleep", "1000"])?;
    let pid = scene.create()?;
    let said = scene.runc(&["pause", "c"])?;
    ensure!(said.is_empty(), "{said}");
    let told = refusal(scene.shim.start("c"))?;
    ensure!(
        told.contains("cannot start a container in the paused state"),
        "{told}"
    );
    scene.runc(&["resume", "c"])?;
    ensure!(scene.status()? == "created", "{}", scene.status()?);
    ensure!(scene.shim.start("c")? == pid, "another pid");
    scene.end()
}

/// By us and by runc: one of both starts it, and the other does not say that it has. A runc that
/// opens the fifo after the init has closed it waits until the container ends.
fn two_starts_at_once_start_it_once(stage: &Stage) -> anyhow::Result<()> {
    const ROUNDS: u32 = 20;
    let scene = Scene::set(stage, &["sleep", "1000"])?;
    for round in 0..ROUNDS {
        scene.create()?;
        scope(|scope| {
            let theirs = scope.spawn(|| {
                let mut runc = Command::new("runc");
                runc.arg("--root")
                    .arg(scene.root())
                    .args(["start", "c"])
                    .status()
            });
            let ours = scene.shim.start("c");
            until("it runs", || Ok(scene.status()? == "running"))?;
            scene.end()?;
            let theirs = theirs.join().ok().context("a thread panicked")??;
            ensure!(
                ours.is_ok() != theirs.success(),
                "round {round}: {ours:?}, {theirs}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

/// Also of one that was never started, and with cgroups below its own.
fn a_delete_needs_no_process_of_runc(stage: &Stage) -> anyhow::Result<()> {
    let scene = Scene::set(stage, &["sleep", "1000"])?;
    for is_started in [true, false] {
        scene.create()?;
        if is_started {
            scene.shim.start("c")?;
            for cgroup in scene.cgroups() {
                fs::create_dir_all(cgroup.join("below/deeper"))?;
            }
            scene.shim.kill("c", Signal::SIGKILL)?;
            ensure!(scene.shim.wait("c")? == 137, "not 137");
            ensure!(scene.status()? == "stopped", "{}", scene.status()?);
        }
        let (is_called, _) = scene.calls_runc(|| Ok(scene.shim.delete("c")?))?;
        ensure!(!is_called, "runc was called, started: {is_started}");
        let said = scene.runc(&["state", "c"])?;
        ensure!(said.contains("container does not exist"), "{said}");
        let list = scene.runc(&["list", "--quiet"])?;
        ensure!(list.is_empty(), "{list}");
        scene.before.wait_for_return(&scene.sandbox)?;
    }
    Ok(())
}

fn a_delete_with_hooks_is_runcs(stage: &Stage) -> anyhow::Result<()> {
    let scene = Scene::set(stage, &["true"])?;
    let trace = scene.sandbox.directory().join("hook");
    for (kind, is_expected) in [
        ("poststop", true),
        ("poststart", false),
        ("prestart", false),
    ] {
        let _ = fs::remove_file(&trace);
        let touch = json!([{"path": "/bin/touch", "args": ["touch", trace]}]);
        scene
            .bundle
            .edit(|spec| spec["hooks"] = json!({ kind: touch }))?;
        scene.create()?;
        scene.shim.start("c")?;
        ensure!(scene.shim.wait("c")? == 0, "not 0");
        let (is_called, _) = scene.calls_runc(|| Ok(scene.shim.delete("c")?))?;
        ensure!(
            is_called == is_expected,
            "{kind}: runc was called: {is_called}"
        );
        ensure!(trace.exists(), "{kind}: the hook was not run");
        scene.before.wait_for_return(&scene.sandbox)?;
    }
    Ok(())
}

/// A process of another is in it. What becomes of that is runc's decision, and differs.
fn a_delete_of_a_busy_cgroup_is_runcs(stage: &Stage) -> anyhow::Result<()> {
    let scene = Scene::set(stage, &["true"])?;
    scene.create()?;
    scene.shim.start("c")?;
    ensure!(scene.shim.wait("c")? == 0, "not 0");
    let cgroup = scene.cgroups().pop().context("it has no cgroup")?;
    let mut stranger = Command::new("sleep").arg("1000").spawn()?;
    fs::write(cgroup.join("cgroup.procs"), stranger.id().to_string())?;
    let (is_called, deleted) = scene.calls_runc(|| Ok(scene.shim.delete("c")))?;
    stranger.kill()?;
    stranger.wait()?;
    ensure!(is_called, "runc was not called");
    if deleted.is_err() {
        scene.shim.delete("c")?;
    }
    let _ = fs::remove_dir(cgroup);
    scene.before.wait_for_return(&scene.sandbox)
}

/// With a root file system that is mounted for it. The daemon's first container may read them.
fn an_ordinary_life_does_not_read_the_nodes_mounts(stage: &Stage) -> anyhow::Result<()> {
    let mut sandbox = stage.bare_sandbox()?;
    let config = sandbox.directory().join("config.toml");
    fs::write(&config, "[log]\nlevel = \"debug\"\n")?;
    sandbox.set_environment("EMBEDSHIM_CONFIG", &config.to_string_lossy());
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["true"])?;
    let (rootfs, image) = (
        bundle.path().join("rootfs"),
        sandbox.directory().join("image"),
    );
    fs::rename(&rootfs, &image)?;
    fs::create_dir(&rootfs)?;
    let before = Footprint::of(&sandbox);
    let readings = || sandbox.daemon_log().matches("list of mounts").count();
    let mut after_first = None;
    for _ in 0..3 {
        shim.create_with("c", bundle.path(), |request| {
            request.rootfs = vec![api::Mount {
                type_: "bind".into(),
                source: image.to_string_lossy().into_owned(),
                options: vec!["rbind".into(), "rw".into()],
                ..api::Mount::default()
            }];
        })?;
        shim.start("c")?;
        ensure!(shim.wait("c")? == 0 && shim.delete("c")? == 0, "not 0");
        let known = *after_first.get_or_insert_with(readings);
        ensure!(known > 0, "the test does not see readings");
        ensure!(readings() == known, "{} readings more", readings() - known);
        before.wait_for_return(&sandbox)?;
    }
    Ok(())
}

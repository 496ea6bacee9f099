//! The library without the daemon and without containerd: the examples do what they say, and nodes
//! and monitors of one program leave each other, and the program's own children, alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use embedshim_core::exit::{ExitMonitor, ExitStatus};
use embedshim_core::id::{ProcessKey, TaskKey};
use embedshim_core::stdio::StdioPaths;
use embedshim_core::task::{CreateTask, Node, NodeConfig, RuntimeOptions};
use embedshim_tests::{Bundle, Footprint, Stage, Test};
use monitor_bpf::{BpfConfig, BpfMonitor, Loading};
use monitor_pidfd::PidfdMonitor;
use nix::sys::signal::Signal;
use testbed::sandbox::{Finished, PATIENCE, Running, Sandbox, is_alive, until};

use crate::tests;

pub(crate) const TESTS: [Test; 4] = tests!(WithoutContainerd:
    the_watch_example_tells_how_a_strangers_child_ended,
    the_probe_example_opens_what_it_has_chosen,
    the_bundle_example_tells_an_exit_that_nobody_saw,
    two_nodes_in_one_program_leave_each_other_alone,
);

fn run(program: &Path, arguments: &[&str]) -> anyhow::Result<Finished> {
    Running::capture(Command::new(program).args(arguments))?.finish(PATIENCE)
}

fn succeed(program: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let finished = run(program, arguments)?;
    ensure!(finished.code == Some(0), "{arguments:?}: {finished:?}");
    Ok(finished.stdout)
}

fn the_watch_example_tells_how_a_strangers_child_ended(stage: &Stage) -> anyhow::Result<()> {
    let watch = stage.example("watch")?;
    // The example's sister, not its child.
    let mut sister = Running::capture(
        Command::new("sh")
            .args(["-c", "read line; exit 3"])
            .stdin(Stdio::piped()),
    )?;
    let mut example = Running::capture(Command::new(&watch).arg(sister.pid().to_string()))?;
    // If it is watched only afterwards, it is a zombie then, and known as well.
    std::thread::sleep(Duration::from_millis(300));
    ensure!(!example.has_ended()?, "{:?}", example.finish(PATIENCE)?);
    sister.feed(b"go\n")?;
    let told = example.finish(PATIENCE)?;
    ensure!(sister.finish(PATIENCE)?.code == Some(3), "not its own end");
    ensure!(told.code == Some(0), "{told:?}");
    for words in ["exit 3", "at: ", "evidence: "] {
        ensure!(told.stdout.contains(words), "{told:?}");
    }
    let gone = run(&watch, &[&sister.pid().to_string()])?;
    ensure!(gone.code == Some(1), "{gone:?}");
    ensure!(gone.stderr.contains("is gone"), "{gone:?}");
    Ok(())
}

fn the_probe_example_opens_what_it_has_chosen(stage: &Stage) -> anyhow::Result<()> {
    let probe = stage.example("probe")?;
    let told = succeed(&probe, &[])?;
    ensure!(told.contains("RANKING\n1. bpf, chosen"), "{told}");
    ensure!(told.contains("\nopened bpf: "), "{told}");
    let told = succeed(&probe, &["pidfd"])?;
    ensure!(told.contains("\nopened pidfd: "), "{told}");
    let mut unprivileged = Command::new("setpriv");
    unprivileged.args(["--bounding-set", "-bpf,-perfmon,-sys_admin"]);
    let refused = Running::capture(unprivileged.arg(&probe).arg("bpf"))?.finish(PATIENCE)?;
    ensure!(refused.code == Some(1), "{refused:?}");
    ensure!(refused.stderr.contains("no permission"), "{refused:?}");
    Ok(())
}

/// A bundle of the example's; what it may have left is removed.
struct Example {
    bundle: PathBuf,
    state_dir: PathBuf,
}

impl Example {
    fn new(sandbox: &Sandbox) -> Self {
        // The container is called as the directory is: like no other on this machine.
        let bundle = sandbox.directory().join(sandbox.namespace());
        let state_dir = bundle.join("state");
        Self { bundle, state_dir }
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        let _ = Command::new("runc")
            .arg("--root")
            .arg(self.state_dir.join("runc/example"))
            .args(["delete", "--force"])
            .args(self.bundle.file_name())
            .output();
        let _ = monitor_bpf::remove_pins(&monitor_bpf::pin_dir_for(&self.state_dir));
    }
}

fn the_bundle_example_tells_an_exit_that_nobody_saw(stage: &Stage) -> anyhow::Result<()> {
    let program = stage.example("bundle")?;
    let sandbox = stage.bare_sandbox()?;
    let example = Example::new(&sandbox);
    let bundle = &*example.bundle.to_string_lossy();
    let script = "echo hello; while ! [ -e /go ]; do sleep 0.1; done; exit 7";
    succeed(&program, &["make", bundle, script])?;
    let told = succeed(&program, &["start", bundle])?;
    let pid = told.split_whitespace().last().context("no pid")?.parse()?;
    ensure!(is_alive(pid), "the container ended with the example");
    // Who waits is killed; that changes nothing.
    let mut waits = Running::capture(Command::new(&program).args(["wait", bundle]))?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(!waits.has_ended()?, "{:?}", waits.finish(PATIENCE)?);
    waits.signal(Signal::SIGKILL)?;
    waits.finish(PATIENCE)?;
    // Nothing of the example's runs while the container ends.
    fs::write(example.bundle.join("rootfs/go"), "")?;
    until("the container ends", || Ok(!is_alive(pid)))?;
    let told = succeed(&program, &["wait", bundle])?;
    ensure!(told.trim() == "exit 7", "{told}");
    let output = fs::read_to_string(example.bundle.join("output"))?;
    ensure!(output == "hello\n", "{output:?}");
    ensure!(!example.state_dir.exists(), "its state is left behind");
    let pins = monitor_bpf::pin_dir_for(&example.state_dir);
    ensure!(!pins.exists(), "its pins are left behind");
    Ok(())
}

/// Pins that end with the test.
struct Pins(PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = monitor_bpf::remove_pins(&self.0);
    }
}

async fn open_node(state_dir: PathBuf, pins: &Pins) -> anyhow::Result<Node> {
    let config = BpfConfig {
        pin_dir: pins.0.clone(),
        capacity: 16,
        loading: Loading::default(),
    };
    let monitor: Arc<dyn ExitMonitor> =
        Arc::new(BpfMonitor::open(&config, Arc::new(PidfdMonitor::new()?))?);
    let config = NodeConfig::new(state_dir);
    Ok(Node::open(config, monitor).await?)
}

async fn run_container(
    node: &Node,
    sandbox: &Sandbox,
    id: &str,
    script: &str,
) -> anyhow::Result<ProcessKey> {
    let bundle = Bundle::new(sandbox, id, &["sh", "-c", script])?;
    let task = TaskKey {
        namespace: sandbox.namespace().parse()?,
        id: id.parse()?,
    };
    let request = CreateTask {
        key: task.clone(),
        bundle: bundle.path().to_owned(),
        rootfs: Vec::new(),
        stdio: StdioPaths::default(),
        runtime: RuntimeOptions::default(),
        checkpoint: None,
        owner: String::new(),
        sandbox: None,
    };
    node.create(request).await?;
    let init = ProcessKey { task, exec: None };
    node.start(&init).await?;
    Ok(init)
}

fn two_nodes_in_one_program_leave_each_other_alone(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    let before = Footprint::of(&sandbox);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(two_nodes(&sandbox))?;
    before.wait_for_return(&sandbox)
}

async fn two_nodes(sandbox: &Sandbox) -> anyhow::Result<()> {
    let places = ["first", "second"].map(|name| sandbox.directory().join(name));
    let pins = places
        .each_ref()
        .map(|place| Pins(monitor_bpf::pin_dir_for(place)));
    let [first_place, second_place] = places;
    let first = open_node(first_place.clone(), &pins[0]).await?;
    let second = open_node(second_place, &pins[1]).await?;
    let four = run_container(&first, sandbox, "four", "exit 4").await?;
    let five = run_container(
        &second,
        sandbox,
        "five",
        "while ! [ -e /go ]; do sleep 0.1; done; exit 5",
    )
    .await?;
    let six = run_container(
        &first,
        sandbox,
        "six",
        "while ! [ -e /go ]; do sleep 0.1; done; exit 6",
    )
    .await?;

    let exit = first.wait(&four).await?;
    ensure!(exit.status == Some(ExitStatus::Exited(4)), "{exit:?}");
    ensure!(second.state(&four).is_err(), "the other one's task");
    ensure!(first.state(&five).is_err(), "the other one's task");

    // A child of this program, which has ended long before it is waited for.
    let mut child = Command::new("sh").args(["-c", "exit 9"]).spawn()?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    ensure!(child.wait()?.code() == Some(9), "something else reaped it");

    // The first is done with for now; the second goes on, and a successor of the first finds what
    // it left.
    first.delete(&four).await?;
    drop(first);
    for id in ["five", "six"] {
        let rootfs = sandbox.directory().join("bundles").join(id).join("rootfs");
        fs::write(rootfs.join("go"), "")?;
    }
    let exit = second.wait(&five).await?;
    ensure!(exit.status == Some(ExitStatus::Exited(5)), "{exit:?}");
    second.delete(&five).await?;
    let first = open_node(first_place, &pins[0]).await?;
    let exit = first.wait(&six).await?;
    ensure!(exit.status == Some(ExitStatus::Exited(6)), "{exit:?}");
    first.delete(&six).await?;
    Ok(())
}

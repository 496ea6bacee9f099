//! The events that containerd publishes for its clients, and their order.

use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Heard, Shim, Stage, Test};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use shim_api::bundle::BundleNote;
use testbed::sandbox::{PATIENCE, Running, Sandbox, is_alive, stop, until};

use crate::tests;

pub(crate) const TESTS: [Test; 4] = tests!(AnyRuntime:
    a_life_is_told_in_order,
    an_execs_exit_is_reported_before_its_containers,
    pausing_is_told,
    running_out_of_memory_is_reported_before_the_exit,
);
pub(crate) const OURS: [Test; 2] = tests!(EmbedshimOnly:
    events_outlive_a_daemon_that_could_not_tell_them,
    an_oom_kill_without_a_daemon_is_told_by_the_next_while_the_container_lives,
);

/// `ctr events`, reading along.
struct Listener {
    path: PathBuf,
    _ctr: Running,
}

impl Listener {
    fn listen(sandbox: &Sandbox) -> anyhow::Result<Self> {
        let path = sandbox.directory().join("events");
        let ctr = Running::spawn(sandbox.ctr(["events"]).stdout(File::create(&path)?))?;
        let listener = Self { path, _ctr: ctr };
        // Nothing says that it listens, until it has heard something.
        let mut number = 0;
        until("ctr events listens", || {
            number += 1;
            sandbox.ctr_ok(&[
                "namespace",
                "label",
                sandbox.namespace(),
                &format!("probe={number}"),
            ])?;
            Ok(!fs::read_to_string(&listener.path)?.is_empty())
        })?;
        Ok(listener)
    }

    /// The tasks' events so far: topic and content.
    fn heard(&self) -> anyhow::Result<Vec<(String, Value)>> {
        let text = fs::read_to_string(&self.path)?;
        let event = |line: &str| {
            let start = line.find("/tasks/")?;
            let (topic, content) = line.get(start..)?.split_once(' ')?;
            Some((
                topic.trim_start_matches("/tasks/").to_owned(),
                serde_json::from_str(content).ok()?,
            ))
        };
        Ok(text.lines().filter_map(event).collect())
    }

    /// Waits for this topic and returns all topics up to it.
    fn topics_until(&self, topic: &str) -> anyhow::Result<Vec<String>> {
        let mut topics = Vec::new();
        until(&format!("{topic} is told"), || {
            topics = self.heard()?.into_iter().map(|(topic, _)| topic).collect();
            Ok(topics.iter().any(|heard| heard == topic))
        })
        .with_context(|| format!("heard: {topics:?}"))?;
        Ok(topics)
    }
}

fn a_life_is_told_in_order(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let listener = Listener::listen(&sandbox)?;
    let finished = Running::capture(&mut sandbox.run(&["--rm"], "c", &["sh", "-c", "exit 21"]))?
        .finish(PATIENCE)?;
    ensure!(finished.code == Some(21), "{finished:?}");
    let topics = listener.topics_until("delete")?;
    ensure!(
        topics == ["create", "start", "exit", "delete"],
        "{topics:?}"
    );
    for (topic, event) in listener.heard()? {
        ensure!(
            event.get("container_id").and_then(Value::as_str) == Some("c"),
            "{topic}: {event}"
        );
        if topic == "exit" {
            ensure!(
                event.get("exit_status").and_then(Value::as_u64) == Some(21),
                "{event}"
            );
            ensure!(event.get("exited_at").is_some(), "{event}");
        }
    }
    Ok(())
}

fn an_execs_exit_is_reported_before_its_containers(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let listener = Listener::listen(&sandbox)?;
    sandbox.detached(&[], "c", &["sleep", "1000"])?;
    sandbox.ctr_ok(&[
        "task",
        "exec",
        "--detach",
        "--exec-id",
        "e",
        "c",
        "sleep",
        "1000",
    ])?;
    sandbox.ctr_ok(&["task", "kill", "--signal", "KILL", "c"])?;
    sandbox.wait_for_status("c", "STOPPED")?;
    sandbox.delete_task("c")?;
    let topics = listener.topics_until("delete")?;
    ensure!(
        topics
            == [
                "create",
                "start",
                "exec-added",
                "exec-started",
                "exit",
                "exit",
                "delete"
            ],
        "{topics:?}"
    );
    let exits: Vec<Value> = listener
        .heard()?
        .into_iter()
        .filter(|(topic, _)| topic == "exit")
        .filter_map(|(_, event)| event.get("id").cloned())
        .collect();
    ensure!(exits == ["e", "c"], "{exits:?}");
    Ok(())
}

fn pausing_is_told(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let listener = Listener::listen(&sandbox)?;
    sandbox.detached(&[], "c", &["sleep", "1000"])?;
    sandbox.ctr_ok(&["task", "pause", "c"])?;
    sandbox.ctr_ok(&["task", "resume", "c"])?;
    let topics = listener.topics_until("resumed")?;
    ensure!(
        topics == ["create", "start", "paused", "resumed"],
        "{topics:?}"
    );
    Ok(())
}

fn running_out_of_memory_is_reported_before_the_exit(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let listener = Listener::listen(&sandbox)?;
    let limit = (32 << 20).to_string();
    let finished = Running::capture(&mut sandbox.run(
        &["--rm", "--memory-limit", &limit],
        "c",
        &["guest", "allocate", "256"],
    ))?
    .finish(PATIENCE)?;
    ensure!(finished.code == Some(137), "{finished:?}");
    let topics = listener.topics_until("delete")?;
    let place = |topic: &str| topics.iter().position(|heard| heard == topic);
    ensure!(
        place("oom").is_some() && place("oom") < place("exit"),
        "{topics:?}"
    );
    Ok(())
}

fn an_oom_kill_without_a_daemon_is_told_by_the_next_while_the_container_lives(
    stage: &Stage,
) -> anyhow::Result<()> {
    const SCRIPT: &str = "until test -e /go; do sleep 0.05; done; guest allocate 256; \
        echo $? >/code; sleep 1000";
    let sandbox = stage.sandbox()?;
    let listener = Listener::listen(&sandbox)?;
    let limit = (32 << 20).to_string();
    let pid = sandbox.detached(&["--memory-limit", &limit], "c", &["sh", "-c", SCRIPT])?;
    let keeper = Pid::from_raw(sandbox.keeper_pid().context("no keeper")?);
    let daemon = Pid::from_raw(sandbox.daemon_pid().context("no daemon")?);
    stop(keeper)?;
    kill(daemon, Signal::SIGKILL)?;
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    File::create(root.join("go"))?;
    until("the kernel kills", || {
        Ok(fs::read_to_string(root.join("code")).is_ok_and(|code| code == "137\n"))
    })?;
    kill(keeper, Signal::SIGCONT)?;
    let topics = listener.topics_until("oom")?;
    ensure!(topics == ["create", "start", "oom"], "{topics:?}");
    ensure!(sandbox.task("c")?.status == "RUNNING", "it lives no more");
    Ok(())
}

/// containerd's listener is away for all of a life and a part of another, and the daemon dies
/// meanwhile.
fn events_outlive_a_daemon_that_could_not_tell_them(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let note = BundleNote {
        events: sandbox
            .directory()
            .join("events.ttrpc")
            .display()
            .to_string(),
        ..BundleNote::default()
    };
    for (id, command) in [("whole", "true"), ("half", "sleep 1000")] {
        let bundle = Bundle::new(&sandbox, id, &["sh", "-c", command])?;
        note.write(bundle.path())?;
        shim.create(id, bundle.path())?;
        shim.start(id)?;
    }
    shim.wait("whole")?;
    shim.delete("whole")?;
    let pid = shim.state("half")?.pid;
    sandbox.end_daemon(Signal::SIGKILL)?;
    kill(Pid::from_raw(pid.try_into()?), Signal::SIGKILL)?;
    until("it ends", || Ok(!is_alive(pid.try_into()?)))?;
    sandbox.start_daemon()?;
    let listener = embedshim_tests::Listener::listen(sandbox.directory())?;
    let shim = Shim::connect(&sandbox)?;
    ensure!(shim.wait("half")? == 137, "the code was lost");
    shim.delete("half")?;
    let is_last = |heard: &Heard| heard.container == "half" && heard.topic == "delete";
    until("the last event is told", || {
        Ok(listener.heard().iter().any(is_last))
    })
    .with_context(|| sandbox.daemon_log())?;
    for id in ["whole", "half"] {
        let told = listener.heard().into_iter();
        let mut topics: Vec<_> = told
            .filter(|heard| heard.container == id)
            .map(|heard| heard.topic)
            .collect();
        // An event may be told twice.
        topics.dedup();
        ensure!(
            topics == ["create", "start", "exit", "delete"],
            "{id}: {topics:?}"
        );
    }
    Ok(())
}

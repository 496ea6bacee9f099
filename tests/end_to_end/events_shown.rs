//! What an operator sees of events: `events --follow` tells each once and in order, of one daemon
//! after the other, `events` and `inspect` tell what the daemon remembers.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use containerd_shim_protos::api;
use embedshim_tests::{Bundle, Shim, Stage, Test};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use testbed::sandbox::{PATIENCE, Running, Sandbox, stop, until};

use crate::operators::{ask, json, started};
use crate::tests;

pub(crate) const OURS: [Test; 5] = tests!(WithoutContainerd:
    a_follower_is_told_each_event_in_order_and_ends_with_the_last_daemon,
    a_follower_goes_on_with_the_next_daemon_and_is_told_each_exit_once,
    a_successor_remembers_its_own_events_and_says_since_when,
    a_follower_whose_reader_has_gone_ends_without_a_word,
    followers_keep_no_client_from_being_answered,
);

/// Lines of events as programs read them.
fn events(text: &str) -> anyhow::Result<Vec<Value>> {
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let lines = whole.lines().map(serde_json::from_str);
    Ok(lines.collect::<Result<_, _>>()?)
}

fn kinds(events: &[Value]) -> Vec<&str> {
    let kinds = events.iter().filter_map(|event| event["kind"].as_str());
    kinds.collect()
}

/// A container that is paused, resumed, has an exec and ends with 137; not deleted.
fn life(sandbox: &Sandbox, shim: &Shim) -> anyhow::Result<()> {
    let bundle = Bundle::new(sandbox, "c", &["sleep", "1000"])?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    shim.exec_with("c", "e", &["sh", "-c", "exit 3"], |_| {})?;
    shim.start_exec("c", "e")?;
    shim.wait_exec("c", "e")?;
    shim.delete_exec("c", "e")?;
    let request = api::PauseRequest {
        id: "c".into(),
        ..api::PauseRequest::default()
    };
    shim.tasks.pause(shim.metadata(), &request)?;
    let request = api::ResumeRequest {
        id: "c".into(),
        ..api::ResumeRequest::default()
    };
    shim.tasks.resume(shim.metadata(), &request)?;
    shim.kill("c", Signal::SIGKILL)?;
    shim.wait("c")?;
    Ok(())
}

fn a_follower_is_told_each_event_in_order_and_ends_with_the_last_daemon(
    stage: &Stage,
) -> anyhow::Result<()> {
    const LIFE: [&str; 9] = [
        "create",
        "start",
        "exec-added",
        "exec-started",
        "exit",
        "paused",
        "resumed",
        "exit",
        "delete",
    ];
    let (sandbox, shim) = started(stage)?;
    // Those that happen before it follows are told, too.
    let (mut following, told) = follow(stage, &sandbox, &["--last", "1000"])?;
    life(&sandbox, &shim)?;
    shim.delete("c")?;
    let seen = || events(&fs::read_to_string(&told)?);
    until("the deletion is told of", || {
        Ok(seen()?.iter().any(|event| event["kind"] == "delete"))
    })?;
    let seen = seen()?;
    ensure!(kinds(&seen) == LIFE, "{seen:?}");
    for (number, event) in seen.iter().enumerate() {
        ensure!(event["number"] == number && event["id"] == "c", "{event}");
        ensure!(event["namespace"] == sandbox.namespace(), "{event}");
    }
    let [exec, init] = [&seen[4], &seen[7]];
    ensure!(exec["exec"] == "e" && exec["exit_code"] == 3, "{exec}");
    ensure!(
        init["exec"].is_null() && init["exit_code"] == 137 && init["pid"] == seen[0]["pid"],
        "{init}"
    );
    let listed = ask(stage, &sandbox, &["events", "--json"])?;
    ensure!(events(&listed.stdout)? == seen, "{listed:?}");
    let last = ask(stage, &sandbox, &["events", "--last", "2"])?.stdout;
    ensure!(
        last.lines().count() == 3 && last.contains("delete") && !last.contains("paused"),
        "{last}"
    );
    drop(shim);
    sandbox.end_daemon(Signal::SIGKILL)?;
    let ended = following.finish(PATIENCE)?;
    ensure!(
        ended.code == Some(9) && ended.stderr.contains("has ended"),
        "{ended:?}"
    );
    Ok(())
}

/// `events --follow --json`, and the file with what it says.
fn follow(
    stage: &Stage,
    sandbox: &Sandbox,
    options: &[&str],
) -> anyhow::Result<(Running, PathBuf)> {
    let told = sandbox.directory().join("told");
    let mut command = Command::new(stage.binary("embedshimd"));
    command
        .args(["events", "--follow", "--json", "--state-dir"])
        .arg(sandbox.state_dir())
        .args(options)
        .stdin(Stdio::null())
        .stdout(fs::File::create(&told)?)
        .stderr(Stdio::piped());
    Ok((Running::spawn(&mut command)?, told))
}

fn a_follower_goes_on_with_the_next_daemon_and_is_told_each_exit_once(
    stage: &Stage,
) -> anyhow::Result<()> {
    let (sandbox, shim) = started(stage)?;
    let (_following, told) = follow(stage, &sandbox, &["--last", "1000"])?;
    let seen = || events(&fs::read_to_string(&told)?);
    life(&sandbox, &shim)?;
    let count = |wanted: &str| {
        let seen = seen()?;
        Ok::<_, anyhow::Error>(kinds(&seen).iter().filter(|kind| **kind == wanted).count())
    };
    until("both exits are told of", || Ok(count("exit")? == 2))?;
    // Its init ends while no daemon is there: nothing but the next one can tell.
    let bundle = Bundle::new(&sandbox, "d", &["sleep", "1000"])?;
    let pid = shim.create("d", bundle.path())?;
    shim.start("d")?;
    until("the second start is told of", || Ok(count("start")? == 2))?;
    let keeper = Pid::from_raw(sandbox.keeper_pid().context("no keeper")?);
    let daemon = Pid::from_raw(sandbox.daemon_pid().context("no daemon")?);
    stop(keeper)?;
    kill(daemon, Signal::SIGKILL)?;
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
    kill(keeper, Signal::SIGCONT)?;
    until("the third exit is told of", || Ok(count("exit")? == 3))?;
    shim.delete("c")?;
    until("a deletion is told of", || Ok(count("delete")? == 1))?;
    let seen = seen()?;
    let replaced = seen
        .iter()
        .position(|line| line["daemon_since"].is_number());
    let replaced = replaced.context("not said that another daemon serves")?;
    let after = seen.get(replaced + 1..).context("nothing after it")?;
    ensure!(kinds(after) == ["exit", "delete"], "{seen:?}");
    ensure!(
        after[0]["id"] == "d" && after[0]["exit_code"] == 137 && after[0]["pid"] == pid,
        "{seen:?}"
    );
    Ok(())
}

fn a_successor_remembers_its_own_events_and_says_since_when(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = started(stage)?;
    life(&sandbox, &shim)?;
    let before = json(stage, &sandbox, &["inspect", "c"])?;
    let history = before["history"]["events"].as_array().context("none")?;
    ensure!(
        history.len() == 8 && history[0]["kind"] == "create",
        "{before}"
    );
    sandbox.kill_daemon()?;
    let mut after = Value::Null;
    until("the exit is told of again", || {
        after = json(stage, &sandbox, &["inspect", "c"])?;
        Ok(after["history"]["events"][0]["kind"] == "exit")
    })?;
    let since = |document: &Value| document["history"]["since"].as_f64();
    ensure!(since(&after) > since(&before), "{before} {after}");
    // At its own time.
    let told = after["history"]["events"].as_array().context("none")?;
    ensure!(
        told.len() == 1 && told[0]["at"] == history[7]["at"],
        "{before} {after}"
    );
    let text = ask(stage, &sandbox, &["inspect", "c"])?.stdout;
    ensure!(text.contains("that the daemon remembers since"), "{text}");
    Ok(())
}

fn a_follower_whose_reader_has_gone_ends_without_a_word(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = started(stage)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    let mut shell = Command::new("sh");
    shell
        .args([
            "-c",
            "\"$1\" events --follow --last 1 --state-dir \"$2\" | head -n 2",
            "sh",
        ])
        .arg(stage.binary("embedshimd"))
        .arg(sandbox.state_dir())
        .stdin(Stdio::null());
    let mut following = Running::capture(&mut shell)?;
    let mut number = 0;
    until("the follower ends", || {
        // It learns that nobody reads when it writes.
        number += 1;
        shim.exec_with("c", &format!("e{number}"), &["true"], |_| {})?;
        following.has_ended()
    })?;
    let finished = following.finish(PATIENCE)?;
    ensure!(
        finished.code == Some(0) && finished.stderr.is_empty(),
        "{finished:?}"
    );
    ensure!(finished.stdout.lines().count() == 2, "{finished:?}");
    Ok(())
}

fn followers_keep_no_client_from_being_answered(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, _shim) = started(stage)?;
    let follow = || -> anyhow::Result<(UnixStream, String)> {
        let mut stream = UnixStream::connect(sandbox.state_dir().join("admin.sock"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /v1/events/follow HTTP/1.1\r\n\r\n")?;
        let mut code = [0; 12];
        stream.read_exact(&mut code)?;
        Ok((stream, String::from_utf8_lossy(&code).into_owned()))
    };
    let mut followers = Vec::new();
    for _ in 0..8 {
        let (stream, code) = follow()?;
        ensure!(code == "HTTP/1.1 200", "{code}");
        followers.push(stream);
    }
    let (_, code) = follow()?;
    ensure!(code == "HTTP/1.1 503", "{code}");
    let status = ask(stage, &sandbox, &["status"])?;
    ensure!(status.code == Some(0), "{status:?}");
    // Those that have gone make room.
    drop(followers);
    until("another is told events", || {
        Ok(follow()?.1 == "HTTP/1.1 200")
    })
}

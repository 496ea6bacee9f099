//! What an operator's program does beside asking a daemon: it watches any process, checks the
//! configuration, and writes a report.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Stage, Test};
use nix::sys::signal::Signal;
use serde_json::Value;
use testbed::sandbox::{Finished, PATIENCE, Running, until};

use crate::operators::{ask, started};
use crate::tests;

pub(crate) const TESTS: [Test; 2] = tests!(EmbedshimOnly:
    watch_tells_how_strangers_end,
    watch_all_tells_every_exit_once,
);

pub(crate) const OURS: [Test; 3] = tests!(WithoutContainerd:
    pins_are_left_when_their_state_directory_is_gone_and_no_daemon_has_them,
    a_configuration_is_checked_as_a_daemon_reads_it,
    a_report_has_what_helps_and_nothing_private,
);

/// Processes whose parent is another one: a shell's child, and a container's init whose main thread
/// ends first.
fn watch_tells_how_strangers_end(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let leader = "trap 'exec guest leader-first 44 50' TERM; sleep 1000 & wait";
    let leader = ["sh", "-c", leader];
    let init = sandbox.detached(&["--null-io"], "c", &leader)?;
    let mut shell = Command::new("sh");
    shell.args(["-c", "sleep 1000 & echo $!; wait"]);
    let mut shell = Running::capture(&mut shell)?;
    let child = child_of(shell.pid())?;
    let mut command = Command::new(stage.binary("embedshimd"));
    command
        .args(["watch", "--json"])
        .args([init, child, child].map(|pid| pid.to_string()))
        .stdin(Stdio::null());
    let said = sandbox.directory().join("said");
    command
        .stdout(Stdio::piped())
        .stderr(fs::File::create(&said)?);
    let mut watching = Running::spawn(&mut command)?;
    until("it watches", || {
        Ok(fs::read_to_string(&said)?.contains("watching 2 processes"))
    })?;
    for (pid, signal) in [(init, Signal::SIGTERM), (child, Signal::SIGKILL)] {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal)?;
    }
    let finished = watching.finish(PATIENCE)?;
    shell.finish(PATIENCE)?;
    ensure!(finished.code == Some(0), "{finished:?}");
    let mut exits: Vec<(i64, i64)> = Vec::new();
    for line in finished.stdout.lines() {
        let exit: Value = serde_json::from_str(line)?;
        let number = |key: &str| exit[key].as_i64().unwrap_or(-1);
        exits.push((number("pid"), number("code")));
        ensure!(exit["evidence"] != "none", "{line}");
    }
    exits.sort_unstable();
    let mut expected = [(i64::from(init), 44), (i64::from(child), 137)];
    expected.sort_unstable();
    ensure!(exits == expected, "{exits:?}");
    Ok(())
}

/// A crowd of short processes, and a container whose main thread ends before the last one.
fn watch_all_tells_every_exit_once(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let (said, told) = (
        sandbox.directory().join("said"),
        sandbox.directory().join("told"),
    );
    let mut command = Command::new(stage.binary("embedshimd"));
    command
        .args(["watch", "--all", "--json"])
        .stdin(Stdio::null())
        .stdout(fs::File::create(&told)?)
        .stderr(fs::File::create(&said)?);
    let mut watching = Running::spawn(&mut command)?;
    until("it watches", || {
        ensure!(!watching.has_ended()?, "{}", fs::read_to_string(&said)?);
        Ok(fs::read_to_string(&said)?.contains("watching all"))
    })?;
    let mut expected = Vec::new();
    for code in 0..100 {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("exit {code}")]);
        let mut shell = Running::spawn(&mut shell)?;
        expected.push((i64::from(shell.pid()), i64::from(code)));
        shell.finish(PATIENCE)?;
    }
    let leader = ["guest", "leader-first", "44", "50"];
    let init = sandbox.detached(&["--null-io"], "c", &leader)?;
    expected.push((init.into(), 44));
    sandbox.wait_for_status("c", "STOPPED")?;
    let seen = || -> anyhow::Result<Vec<(i64, i64)>> {
        let text = fs::read_to_string(&told)?;
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let mut seen = Vec::new();
        for line in whole.lines() {
            let exit: Value = serde_json::from_str(line)?;
            let number = |key: &str| exit[key].as_i64().unwrap_or(-1);
            if expected.iter().any(|(pid, _)| *pid == number("pid")) {
                seen.push((number("pid"), number("code")));
            }
        }
        Ok(seen)
    };
    until("all are told of", || Ok(seen()?.len() >= expected.len()))?;
    ensure!(seen()? == expected, "{:?}", seen()?);
    Ok(())
}

/// The only child of a process, once it is there.
fn child_of(pid: i32) -> anyhow::Result<i32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let mut child = None;
    until("it has a child", || {
        let children = fs::read_to_string(&path)?;
        child = children
            .split_whitespace()
            .next()
            .and_then(|pid| pid.parse().ok());
        Ok(child.is_some())
    })?;
    child.context("it has no child")
}

fn a_configuration_is_checked_as_a_daemon_reads_it(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    let file = sandbox.directory().join("config.toml");
    let config = |word: &str| -> anyhow::Result<Finished> {
        let mut command = Command::new(stage.binary("embedshimd"));
        command
            .args(["config", word, "--config"])
            .arg(&file)
            .env("EMBEDSHIM_LOG", "debug")
            .stdin(Stdio::null());
        Running::capture(&mut command)?.finish(PATIENCE)
    };
    fs::write(&file, "[monitor]\n\ncapacity = 77\n")?;
    let checked = config("check")?;
    ensure!(checked.code == Some(0), "{checked:?}");
    let shown = config("show")?.stdout;
    let line = |key: &str| {
        let words = shown.lines().find(|line| line.starts_with(key));
        words.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    let expected = [
        ("monitor.capacity", format!("77 {}, line 3", file.display())),
        ("monitor.backend", "\"auto\" default".to_owned()),
        ("log.level", "\"debug\" EMBEDSHIM_LOG".to_owned()),
        ("metrics.listen", "- default".to_owned()),
    ];
    for (key, rest) in expected {
        ensure!(line(key) == Some(format!("{key} {rest}")), "{key}: {shown}");
    }
    fs::write(&file, "[monitor]\ncapacitty = 77\n")?;
    for word in ["check", "show"] {
        let refused = config(word)?;
        ensure!(
            refused.code == Some(3) && refused.stderr.contains("did you mean `capacity`?"),
            "{refused:?}"
        );
    }
    Ok(())
}

fn a_report_has_what_helps_and_nothing_private(stage: &Stage) -> anyhow::Result<()> {
    const SECRET: &str = "hunter2";
    let (sandbox, shim) = started(stage)?;
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", "sleep 1000; echo hunter2"])?;
    bundle.edit(|spec| {
        if let Some(Value::Array(environment)) = spec.pointer_mut("/process/env") {
            environment.push(format!("PASSWORD={SECRET}").into());
        }
    })?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    shim.exec_with("c", "e", &["echo", SECRET], |_| {})?;
    let file = sandbox.directory().join("report.tar");
    let output = file.to_string_lossy().into_owned();
    let told = ask(stage, &sandbox, &["report", "--output", &output])?;
    ensure!(told.code == Some(0), "{told:?}");
    let mode = fs::metadata(&file)?.mode();
    ensure!(mode & 0o7777 == 0o600, "{mode:o}");
    let bytes = String::from_utf8_lossy(&fs::read(&file)?).into_owned();
    ensure!(!bytes.contains(SECRET), "the secret is in it");
    let record = format!("records/{}:c.json", sandbox.namespace());
    for name in [
        "README.txt",
        "status.json",
        "tasks.json",
        "sandboxes.json",
        "events.json",
        "metrics.txt",
        "probe.json",
        "config.txt",
        "versions.txt",
        "log.txt",
        "state-dir.txt",
        "lives.json",
        &record,
    ] {
        ensure!(
            listed(&file)?.contains(&format!("/{name}\n")),
            "{name} is missing"
        );
    }
    let again = ask(stage, &sandbox, &["report", "--output", &output])?;
    ensure!(again.code == Some(1), "nothing is overwritten: {again:?}");
    // Without a daemon it has what is on disk.
    sandbox.end_daemon(Signal::SIGKILL)?;
    fs::remove_file(&file)?;
    let told = ask(stage, &sandbox, &["report", "--output", &output])?;
    ensure!(told.code == Some(0), "{told:?}");
    let listed = listed(&file)?;
    ensure!(
        listed.contains("/status.json.error.txt\n") && listed.contains(&record),
        "{listed}"
    );
    Ok(())
}

/// The names in an archive, as tar lists them.
fn listed(archive: &Path) -> anyhow::Result<String> {
    let mut tar = Command::new("tar");
    tar.arg("-tf").arg(archive);
    let finished = Running::capture(&mut tar)?.finish(PATIENCE)?;
    ensure!(finished.code == Some(0), "{finished:?}");
    Ok(finished.stdout)
}

/// A daemon whose state directory is removed goes on with its pins; only both together leave them.
fn pins_are_left_when_their_state_directory_is_gone_and_no_daemon_has_them(
    stage: &Stage,
) -> anyhow::Result<()> {
    let (sandbox, shim) = started(stage)?;
    let state_dir = sandbox.state_dir();
    let pins = |more: &[&str]| -> anyhow::Result<Vec<Value>> {
        let mut command = Command::new(stage.binary("embedshimd"));
        command.args(["pins", "--json"]).args(more).arg(&state_dir);
        let listed = Running::capture(&mut command)?.finish(PATIENCE)?;
        let rows = serde_json::from_str(&listed.stdout);
        rows.with_context(|| format!("{more:?}: {listed:?}"))
    };
    let first = pins(&[])?.pop().context("no pins")?;
    let daemon = sandbox.daemon_pid().context("no daemon")?;
    let users = first["users"].as_array().context("no users")?;
    ensure!(
        users.contains(&daemon.into()) && first["is_left"] == false,
        "{first}"
    );
    drop(shim);
    sandbox.end_daemon(Signal::SIGKILL)?;
    let stopped = pins(&["--remove"])?.pop().context("they are removed")?;
    ensure!(
        stopped["users"] == serde_json::json!([]) && stopped["is_left"] == false,
        "{stopped}"
    );
    let away = sandbox.directory().join("away");
    fs::rename(&state_dir, &away)?;
    let left = pins(&[])?.pop().context("not listed")?;
    ensure!(
        left["is_left"] == true && left["is_removed"] == false,
        "{left}"
    );
    let removed = pins(&["--remove"])?.pop().context("not listed")?;
    ensure!(
        removed["is_removed"] == true && pins(&[])?.is_empty(),
        "{removed}"
    );
    let path = removed["pins"].as_str().context("no path")?;
    ensure!(!Path::new(path).exists(), "{path} is there");
    Ok(fs::rename(away, state_dir)?)
}

//! What an operator asks of a daemon: `status`, `ps` and `inspect` tell of real containers, also
//! while other things wait, and to root alone.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Shim, Stage, Test, binary_name, write_program};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::Value;
use testbed::sandbox::{Finished, PATIENCE, Running, Sandbox, until};

use crate::tests;

pub(crate) const TESTS: [Test; 2] = tests!(EmbedshimOnly:
    status_ps_and_inspect_tell_of_containers_and_of_their_exits,
    events_wait_for_a_containerd_that_is_down_and_are_counted,
);

pub(crate) const OURS: [Test; 7] = tests!(WithoutContainerd:
    a_runtime_that_hangs_is_named_and_holds_up_no_answer,
    a_stream_that_is_not_read_is_named,
    a_restart_is_told_of_with_its_reason,
    without_a_daemon_or_a_keeper_the_exit_code_says_so,
    only_root_is_answered,
    clients_that_say_nothing_hold_up_no_other,
    a_list_that_repeats_ends_with_its_reader,
);

/// Runs a command of `embedshimd` against the daemon of a sandbox.
pub(crate) fn ask(stage: &Stage, sandbox: &Sandbox, words: &[&str]) -> anyhow::Result<Finished> {
    let mut command = Command::new(stage.binary("embedshimd"));
    command
        .args(words)
        .arg("--state-dir")
        .arg(sandbox.state_dir())
        .stdin(Stdio::null());
    Running::capture(&mut command)?.finish(PATIENCE)
}

/// The document that a command prints.
pub(crate) fn json(stage: &Stage, sandbox: &Sandbox, words: &[&str]) -> anyhow::Result<Value> {
    let words = [words, &["--json"]].concat();
    let finished = ask(stage, sandbox, &words)?;
    let document = serde_json::from_str(&finished.stdout);
    document.with_context(|| format!("{words:?}: {finished:?}"))
}

pub(crate) fn started(stage: &Stage) -> anyhow::Result<(Sandbox, Shim)> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    Ok((sandbox, shim))
}

fn status_ps_and_inspect_tell_of_containers_and_of_their_exits(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let pid = sandbox.detached(&["--null-io"], "runs", &["sleep", "1000"])?;
    sandbox.detached(&["--null-io"], "ended", &["sh", "-c", "exit 7"])?;
    sandbox.wait_for_status("ended", "STOPPED")?;
    let mut exec = sandbox.ctr(["task", "exec", "--detach", "--exec-id", "more"]);
    exec.args(["--fifo-dir"])
        .arg(sandbox.directory().join("fifo"))
        .args(["runs", "sleep", "1000"]);
    let executed = Running::capture(&mut exec)?.finish(PATIENCE)?;
    ensure!(executed.code == Some(0), "{executed:?}");

    let text = ask(stage, &sandbox, &["status"])?;
    ensure!(
        text.code == Some(0) && text.stdout.contains("all is well"),
        "{text:?}"
    );
    let status = json(stage, &sandbox, &["status"])?;
    let told = |pointer: &str| status.pointer(pointer).cloned().unwrap_or_default();
    let expected = [
        ("/tasks/running", 1),
        ("/tasks/stopped", 1),
        ("/execs/running", 1),
        ("/restarts/count", 0),
        ("/monitor/watched", 2),
    ];
    for (pointer, number) in expected {
        ensure!(told(pointer) == number, "{pointer}: {status}");
    }
    let daemon = sandbox.daemon_pid().context("no daemon")?;
    ensure!(told("/daemon/pid") == daemon, "{status}");
    let keeper = sandbox.keeper_pid().context("no keeper")?;
    ensure!(told("/manager/keeper/pid") == keeper, "{status}");
    ensure!(told("/connections").as_u64() >= Some(2), "{status}");

    let tasks = json(stage, &sandbox, &["ps"])?;
    let runs = &tasks["tasks"][1];
    ensure!(runs["id"] == "runs" && runs["pid"] == pid, "{tasks}");
    ensure!(runs["state"] == "running" && runs["execs"] == 1, "{tasks}");
    ensure!(runs["memory_bytes"].as_u64() > Some(0), "{tasks}");
    ensure!(runs["age_seconds"].as_f64() < Some(300.0), "{tasks}");
    let text = ask(stage, &sandbox, &["ps"])?.stdout;
    ensure!(
        text.contains("stopped (7)") && text.lines().count() == 3,
        "{text}"
    );

    let ended = json(stage, &sandbox, &["inspect", "ended"])?;
    let exit = &ended["init"]["exit"];
    ensure!(exit["code"] == 7 && exit["status"] == "exit 7", "{ended}");
    let evidence = exit["evidence"].as_str().unwrap_or_default();
    ensure!(["wait", "bpf"].contains(&evidence), "{ended}");
    let text = ask(stage, &sandbox, &["inspect", "runs"])?.stdout;
    ensure!(
        text.contains("exec more") && !text.contains("sleep"),
        "{text}"
    );
    let none = ask(stage, &sandbox, &["inspect", "absent"])?;
    ensure!(
        none.code == Some(1) && none.stderr.contains("absent"),
        "{none:?}"
    );
    Ok(())
}

fn a_runtime_that_hangs_is_named_and_holds_up_no_answer(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = started(stage)?;
    let program = sandbox.directory().join("hangs");
    let release = sandbox.directory().join("release");
    let wait = format!(
        "#!/bin/sh\nwhile ! [ -e {} ]; do sleep 0.05; done\nexit 1\n",
        release.display()
    );
    write_program(&program, &wait)?;
    let bundle = Bundle::new(&sandbox, "slow", &["true"])?;
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let creating = scope.spawn(|| {
            shim.create_with("slow", bundle.path(), |request| {
                request.options = binary_name(&program);
            })
        });
        let seen = until("the call is named", || {
            let status = json(stage, &sandbox, &["status"])?;
            let call = &status["runtime_calls"][0];
            Ok(call["id"] == "slow" && call["operation"] == "create")
        })
        .and_then(|()| ask(stage, &sandbox, &["ps"]));
        // Whatever was seen: the thread has to end.
        fs::write(&release, "")?;
        let created = creating.join().ok().context("the client has panicked")?;
        let listed = seen?.stdout;
        ensure!(
            listed.contains("slow") && listed.contains("creating"),
            "{listed}"
        );
        ensure!(created.is_err(), "{created:?}");
        Ok(())
    })?;
    let status = json(stage, &sandbox, &["status"])?;
    ensure!(
        status["runtime_calls"] == Value::Array(Vec::new()),
        "{status}"
    );
    Ok(())
}

fn a_stream_that_is_not_read_is_named(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = started(stage)?;
    let fifo = sandbox.directory().join("stdout");
    mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR)?;
    let bundle = Bundle::new(&sandbox, "much", &["sh", "-c", "busybox seq 600000"])?;
    shim.create_with("much", bundle.path(), |request| {
        request.stdout = fifo.to_string_lossy().into_owned();
    })?;
    shim.start("much")?;
    until("the stream is named", || {
        let status = json(stage, &sandbox, &["status"])?;
        let stream = &status["blocked_streams"][0];
        Ok(stream["id"] == "much" && stream["stream"] == "stdout")
    })?;
    let text = ask(stage, &sandbox, &["inspect", "much"])?.stdout;
    ensure!(text.contains("stdout takes nothing"), "{text}");
    // It is no fault: a client may come back and read.
    let status = ask(stage, &sandbox, &["status"])?;
    ensure!(status.code == Some(0), "{status:?}");
    shim.kill("much", Signal::SIGKILL)?;
    shim.wait("much")?;
    shim.delete("much")?;
    Ok(())
}

fn a_restart_is_told_of_with_its_reason(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, _shim) = started(stage)?;
    let mut expected = 0;
    for (signal, words, failures) in [
        (Signal::SIGKILL, "killed by signal 9", 1),
        (Signal::SIGHUP, "make way", 1),
        (Signal::SIGTERM, "asked to leave", 1),
        (Signal::SIGABRT, "killed by signal 6", 2),
        (Signal::SIGKILL, "killed by signal 9", 3),
    ] {
        sandbox.replace_daemon(signal)?;
        expected += 1;
        let status = json(stage, &sandbox, &["status"])?;
        let restarts = &status["restarts"];
        ensure!(restarts["count"] == expected, "{signal}: {status}");
        ensure!(
            restarts["recent_failures"] == failures,
            "{signal}: {status}"
        );
        let reason = restarts["last"]["reason"].as_str().unwrap_or_default();
        ensure!(reason.contains(words), "{signal}: {status}");
    }
    let status = ask(stage, &sandbox, &["status"])?;
    ensure!(
        status.code == Some(8) && status.stdout.contains("ended by themselves"),
        "{status:?}"
    );
    Ok(())
}

fn events_wait_for_a_containerd_that_is_down_and_are_counted(stage: &Stage) -> anyhow::Result<()> {
    let mut sandbox = stage.sandbox()?;
    sandbox.detached(&["--null-io"], "c", &["sleep", "1000"])?;
    let waiting = |sandbox: &Sandbox| -> anyhow::Result<Option<u64>> {
        let status = json(stage, sandbox, &["status"])?;
        Ok(status["events"][0]["waiting"].as_u64())
    };
    until("containerd has all events", || {
        Ok(waiting(&sandbox)? == Some(0))
    })?;
    let pid = sandbox.task("c")?.pid;
    sandbox.kill_containerd()?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL)?;
    until("the exit waits", || Ok(waiting(&sandbox)? == Some(1)))?;
    let status = json(stage, &sandbox, &["status"])?;
    let oldest = &status["events"][0]["oldest_seconds"];
    ensure!(oldest.as_f64() < Some(300.0), "{status}");
    sandbox.start_containerd()?;
    until("containerd has all events", || {
        Ok(waiting(&sandbox)? == Some(0))
    })
}

fn without_a_daemon_or_a_keeper_the_exit_code_says_so(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    for words in [["status"].as_slice(), &["ps"], &["inspect", "c"]] {
        let finished = ask(stage, &sandbox, words)?;
        ensure!(
            finished.code == Some(9) && finished.stderr.contains("no embedshimd runs"),
            "{words:?}: {finished:?}"
        );
    }
    let mut alone = Command::new(stage.binary("embedshimd"));
    alone
        .args(["serve", "--state-dir"])
        .arg(sandbox.state_dir())
        .stdin(Stdio::null());
    let _alone = Running::capture(&mut alone)?;
    until("it serves", || {
        Ok(json(stage, &sandbox, &["status"])
            .is_ok_and(|status| status["daemon"]["phase"] == "serving"))
    })?;
    let status = ask(stage, &sandbox, &["status"])?;
    ensure!(
        status.code == Some(8) && status.stdout.contains("no service manager"),
        "{status:?}"
    );
    Ok(())
}

fn only_root_is_answered(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, _shim) = started(stage)?;
    let socket = sandbox.state_dir().join("admin.sock");
    let mode = fs::metadata(&socket)?.mode();
    ensure!(mode & 0o7777 == 0o600, "{mode:o}");
    // The same program as another user, who finds everything open.
    let program = sandbox.directory().join("embedshimd");
    fs::copy(stage.binary("embedshimd"), &program)?;
    for (path, mode) in [
        (sandbox.directory(), 0o755),
        (&sandbox.state_dir(), 0o755),
        (&socket, 0o666),
    ] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    }
    let ask_as = |user: u32| -> anyhow::Result<Finished> {
        let mut command = Command::new(&program);
        command
            .args(["status", "--json", "--state-dir"])
            .arg(sandbox.state_dir())
            .uid(user)
            .stdin(Stdio::null());
        Running::capture(&mut command)?.finish(PATIENCE)
    };
    let root = ask_as(0)?;
    ensure!(root.code == Some(0), "{root:?}");
    let other = ask_as(65_534)?;
    ensure!(
        other.code == Some(9) && other.stdout.is_empty(),
        "{other:?}"
    );
    let log = sandbox.daemon_log();
    ensure!(log.contains("it is user 65534"), "{log}");
    Ok(())
}

fn clients_that_say_nothing_hold_up_no_other(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, _shim) = started(stage)?;
    let socket = sandbox.state_dir().join("admin.sock");
    let silent: Vec<UnixStream> = (0..4)
        .map(|_| UnixStream::connect(&socket))
        .collect::<Result<_, _>>()?;
    let began = Instant::now();
    let status = ask(stage, &sandbox, &["status"])?;
    ensure!(status.code == Some(0), "{status:?}");
    let took = began.elapsed();
    ensure!(took < Duration::from_secs(4), "{took:?}");
    // Each is given up, and what is no request is refused.
    for mut stream in silent {
        let _ = stream.write_all(b"DELETE / HTTP/1.1\r\n\r\n");
        let mut answer = String::new();
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.read_to_string(&mut answer)?;
        ensure!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 405 "),
            "{answer}"
        );
    }
    // More than are answered at once: some are refused, and afterwards all is as before.
    let many: Vec<_> = (0..100)
        .map(|_| UnixStream::connect(&socket))
        .collect::<Result<Vec<_>, _>>()?;
    drop(many);
    until("it answers again", || {
        Ok(ask(stage, &sandbox, &["ps"])?.code == Some(0))
    })
}

fn a_list_that_repeats_ends_with_its_reader(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, _shim) = started(stage)?;
    let mut shell = Command::new("sh");
    shell
        .args([
            "-c",
            "\"$1\" ps --watch 1 --state-dir \"$2\" | head -n 2",
            "sh",
        ])
        .arg(stage.binary("embedshimd"))
        .arg(sandbox.state_dir())
        .stdin(Stdio::null());
    let finished = Running::capture(&mut shell)?.finish(PATIENCE)?;
    ensure!(
        finished.code == Some(0) && finished.stderr.is_empty(),
        "{finished:?}"
    );
    ensure!(
        finished.stdout.matches("NAMESPACE").count() == 2,
        "{finished:?}"
    );
    Ok(())
}

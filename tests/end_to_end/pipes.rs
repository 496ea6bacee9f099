//! Streams without a terminal, as their clients see them: every byte once, the end by itself and
//! not before, and the runtime's own words never among them.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Footprint, Reader, Shim, Stage, Test, ensure_counted, writer};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::sandbox::{PATIENCE, Running, Sandbox, is_alive, until};

use crate::tests;

pub(crate) const TESTS: [Test; 5] = tests!(AnyRuntime:
    input_can_be_opened_by_name,
    an_exec_that_leaves_a_child_does_not_hold_its_client,
    a_runtimes_words_are_in_no_stream,
    streams_are_pipes,
    an_execs_output_cannot_be_read_by_it,
);
pub(crate) const OURS: [Test; 9] = tests!(EmbedshimOnly:
    output_is_whole_over_every_kind_of_end_of_a_daemon,
    output_is_whole_though_the_daemon_is_killed_within_a_creation,
    an_execs_output_is_whole_though_the_daemon_is_killed_within_its_start,
    large_output_is_whole_over_many_daemons,
    input_is_whole_over_many_daemons,
    an_init_goes_on_writing_when_keeper_and_daemon_are_killed,
    finished_execs_hold_no_descriptors,
    an_execs_child_that_holds_the_output_is_waited_for_two_seconds,
    a_client_that_never_reads_holds_up_its_process_and_nothing_else,
);

fn start(stage: &Stage) -> anyhow::Result<(Sandbox, Shim)> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    Ok((sandbox, shim))
}

/// A container in which execs run.
fn sleeping(sandbox: &Sandbox, shim: &Shim) -> anyhow::Result<u32> {
    let bundle = Bundle::new(sandbox, "c", &["sleep", "1000"])?;
    shim.create("c", bundle.path())?;
    Ok(shim.start("c")?)
}

fn end(sandbox: &Sandbox, shim: &Shim, before: &Footprint) -> anyhow::Result<()> {
    shim.kill("c", Signal::SIGKILL)?;
    ensure!(
        shim.wait("c")? == 137 && shim.delete("c")? == 137,
        "not 137"
    );
    before.wait_for_return(sandbox)
}

/// What is typed is short, so that its end may come before the opening: with a fifo that would wait
/// for a writer.
fn input_can_be_opened_by_name(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&["--null-io"], "c", &["sleep", "1000"])?;
    for (number, script) in [
        "cat",
        "cat /dev/stdin",
        "sleep 0.3; cat /dev/stdin",
        "sleep 0.3; cat /proc/self/fd/0",
        "sleep 0.3; cat </dev/stdin",
    ]
    .iter()
    .enumerate()
    {
        let exec = format!("e{number}");
        let mut command =
            sandbox.ctr(["task", "exec", "--exec-id", &exec, "c", "sh", "-c", script]);
        let mut client = Running::capture(command.stdin(Stdio::piped()))?;
        client.feed(b"typed\n")?;
        let finished = client.finish(PATIENCE)?;
        ensure!(finished.stdout == "typed\n", "{script}: {finished:?}");
    }
    Ok(())
}

fn an_exec_that_leaves_a_child_does_not_hold_its_client(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&["--null-io"], "c", &["sleep", "1000"])?;
    let script = "sleep 63 & echo out; exit 7";
    let mut command = sandbox.ctr(["task", "exec", "--exec-id", "e", "c", "sh", "-c", script]);
    let finished = Running::capture(&mut command)?.finish(PATIENCE)?;
    ensure!(
        finished.code == Some(7) && finished.stdout == "out\n",
        "{finished:?}"
    );
    let processes = sandbox.ctr_ok(&["task", "ps", "c"])?;
    // A heading, the init and the child.
    ensure!(processes.lines().count() == 3, "{processes}");
    Ok(())
}

fn a_runtimes_words_are_in_no_stream(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let said =
        |finished: &testbed::sandbox::Finished| finished.stderr.matches("no such file").count();
    let mut run = sandbox.run(&["--rm"], "c", &["/no/such"]);
    let finished = Running::capture(&mut run)?.finish(PATIENCE)?;
    ensure!(
        said(&finished) == 1 && finished.stdout.is_empty(),
        "{finished:?}"
    );
    sandbox.detached(&["--null-io"], "other", &["sleep", "1000"])?;
    let mut exec = sandbox.ctr(["task", "exec", "--exec-id", "e", "other", "/no/such"]);
    let finished = Running::capture(&mut exec)?.finish(PATIENCE)?;
    ensure!(
        said(&finished) == 1 && finished.stdout.is_empty(),
        "{finished:?}"
    );
    let log = sandbox.directory().join("log");
    let uri = format!("file://{}", log.display());
    ensure!(
        sandbox
            .detached(&["--log-uri", &uri], "d", &["/no/such"])
            .is_err(),
        "it runs"
    );
    let text = fs::read_to_string(&log).unwrap_or_default();
    ensure!(text.is_empty(), "{text}");
    Ok(())
}

/// An anonymous pipe each, which CRIU knows, and no file of the host.
fn streams_are_pipes(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let log = format!("file://{}", sandbox.directory().join("log").display());
    for (id, options) in [("fifo", vec![]), ("file", vec!["--log-uri", &log])] {
        let pid = sandbox.detached(&options, id, &["sleep", "1000"])?;
        for stream in 1..=2 {
            let path = PathBuf::from(format!("/proc/{pid}/fd/{stream}"));
            let link = fs::read_link(&path)?;
            ensure!(
                link.to_string_lossy().starts_with("pipe:["),
                "{id}: {}",
                link.display()
            );
            ensure!(fs::metadata(&path)?.file_type().is_fifo(), "{id}");
        }
    }
    Ok(())
}

fn an_execs_output_cannot_be_read_by_it(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&["--null-io"], "c", &["sleep", "1000"])?;
    let script = "echo own; head -c 4 <&1 2>/dev/null; exit 0";
    let mut command = sandbox.ctr(["task", "exec", "--exec-id", "e", "c", "sh", "-c", script]);
    let finished = Running::capture(&mut command)?.finish(PATIENCE)?;
    ensure!(finished.stdout == "own\n", "{finished:?}");
    Ok(())
}

/// Killed, stopped, asked by its keeper, upgraded, under the clients of a container and of an exec.
fn output_is_whole_over_every_kind_of_end_of_a_daemon(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&["--null-io"], "other", &["sleep", "1000"])?;
    let script = "i=0; while [ $i -lt 80 ]; do i=$((i+1)); echo line $i; sleep 0.05; done; exit 7";
    let run = sandbox.run(&["--rm"], "c", &["sh", "-c", script]);
    let exec = sandbox.ctr([
        "task",
        "exec",
        "--exec-id",
        "e",
        "other",
        "sh",
        "-c",
        script,
    ]);
    let mut clients = [run, exec]
        .into_iter()
        .map(|mut command| Running::capture(&mut command))
        .collect::<anyhow::Result<Vec<_>>>()?;
    std::thread::sleep(Duration::from_millis(500));
    sandbox.kill_daemon()?;
    sandbox.replace_daemon(Signal::SIGTERM)?;
    let old = sandbox.daemon_pid().context("no daemon")?;
    let keeper = sandbox.keeper_pid().context("no keeper")?;
    kill(Pid::from_raw(keeper), Signal::SIGHUP)?;
    sandbox.successor_of(old)?;
    crate::terminals::upgrade(stage, &sandbox)?;
    for client in &mut clients {
        let finished = client.finish(PATIENCE)?;
        ensure_counted(&finished.stdout, "line", 80)?;
        ensure!(finished.code == Some(7), "{finished:?}");
    }
    Ok(())
}

/// A little and more than a pipe holds, by `ctr run`, with a kill at each of many instants of the
/// creation.
fn output_is_whole_though_the_daemon_is_killed_within_a_creation(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    Running::capture(&mut sandbox.run(&["--rm"], "first", &["true"]))?.finish(PATIENCE)?;
    for instant in 0..16_u64 {
        let lines = if instant % 2 == 0 { 10 } else { 30_000 };
        let script =
            format!("seq {lines} | while read n; do echo line $n; done; echo end >&2; exit 3");
        let id = format!("c{instant}");
        let mut run = sandbox.run(&["--rm"], &id, &["sh", "-c", &script]);
        let mut client = Running::capture(&mut run)?;
        std::thread::sleep(Duration::from_millis(20 + 8 * instant));
        sandbox.kill_daemon()?;
        let finished = client.finish(PATIENCE)?;
        ensure_counted(&finished.stdout, "line", lines)
            .with_context(|| format!("killed at instant {instant}: {finished:?}"))?;
        ensure!(
            finished.code == Some(3) && finished.stderr == "end\n",
            "{instant}: {finished:?}"
        );
    }
    Ok(())
}

fn an_execs_output_is_whole_though_the_daemon_is_killed_within_its_start(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&["--null-io"], "c", &["sleep", "1000"])?;
    for instant in 0..16_u64 {
        let lines = if instant % 2 == 0 { 10 } else { 30_000 };
        let script = format!("seq {lines} | while read n; do echo line $n; done; exit 3");
        let exec = format!("e{instant}");
        let arguments = ["task", "exec", "--exec-id", &exec, "c", "sh", "-c", &script];
        let mut client = Running::capture(&mut sandbox.ctr(arguments))?;
        std::thread::sleep(Duration::from_millis(10 + 4 * instant));
        sandbox.kill_daemon()?;
        let finished = client.finish(PATIENCE)?;
        ensure_counted(&finished.stdout, "line", lines)
            .with_context(|| format!("killed at instant {instant}: {finished:?}"))?;
        ensure!(finished.code == Some(3), "{instant}: {finished:?}");
    }
    Ok(())
}

/// Megabytes through pipes that are always full, with a slow client.
fn large_output_is_whole_over_many_daemons(stage: &Stage) -> anyhow::Result<()> {
    const LINES: usize = 400_000;
    let (sandbox, shim) = start(stage)?;
    let script = format!("busybox seq {LINES} | busybox sed 's/^/line /'; exit 5");
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", &script])?;
    let before = Footprint::of(&sandbox);
    let mut reader = Reader::new(&sandbox, "out")?;
    shim.create_with("c", bundle.path(), |request| request.stdout = reader.path())?;
    shim.start("c")?;
    let mut kills = 0;
    while !reader.has_ended() {
        sandbox.kill_daemon()?;
        kills += 1;
    }
    ensure_counted(&reader.finish()?, "line", LINES)?;
    ensure!(
        kills > 0 && shim.wait("c")? == 5 && shim.delete("c")? == 5,
        "not 5"
    );
    before.wait_for_return(&sandbox)
}

fn input_is_whole_over_many_daemons(stage: &Stage) -> anyhow::Result<()> {
    const LINES: usize = 100_000;
    let (sandbox, shim) = start(stage)?;
    let bundle = Bundle::new(&sandbox, "c", &["busybox", "cat"])?;
    let before = Footprint::of(&sandbox);
    let mut reader = Reader::new(&sandbox, "out")?;
    let (stdin, mut input) = writer(&sandbox, "in")?;
    shim.create_with("c", bundle.path(), |request| {
        request.stdin = stdin.to_string_lossy().into_owned();
        request.stdout = reader.path();
    })?;
    shim.start("c")?;
    let typing = std::thread::spawn(move || -> std::io::Result<()> {
        for line in 1..=LINES {
            input.write_all(format!("line {line}\n").as_bytes())?;
        }
        Ok(())
    });
    let mut kills = 0;
    while !typing.is_finished() || kills == 0 {
        sandbox.kill_daemon()?;
        kills += 1;
    }
    typing
        .join()
        .map_err(|_| anyhow::anyhow!("it panicked"))??;
    // The client has gone, and that is no end.
    sandbox.kill_daemon()?;
    ensure!(!reader.has_ended(), "its input has ended with its client");
    shim.close_stdin("c")?;
    ensure_counted(&reader.finish()?, "line", LINES)?;
    ensure!(shim.wait("c")? == 0 && shim.delete("c")? == 0, "not 0");
    before.wait_for_return(&sandbox)
}

/// What it writes meanwhile waits in its pipe, which is found by its own descriptors.
fn an_init_goes_on_writing_when_keeper_and_daemon_are_killed(stage: &Stage) -> anyhow::Result<()> {
    const LINES: usize = 20_000;
    let (sandbox, shim) = start(stage)?;
    let script = format!(
        "trap 'echo broken > /broken' PIPE; i=0; while [ $i -lt {LINES} ]; do i=$((i+1)); echo line $i || echo $i >/broken; done; \
         read wait </dev/zero; exit 4"
    );
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", &script])?;
    bundle.edit(|spec| spec["root"]["readonly"] = false.into())?;
    let log = sandbox.directory().join("log");
    let pid = shim.create_with("c", bundle.path(), |request| {
        request.stdout = format!("file://{}", log.display());
    })?;
    shim.start("c")?;
    until("it writes", || {
        Ok(fs::metadata(&log).is_ok_and(|log| log.len() > 1000))
    })?;
    let mut lengths = Vec::new();
    for _ in 0..3 {
        sandbox.end_daemon(Signal::SIGKILL)?;
        // It fills its pipe, and waits.
        std::thread::sleep(Duration::from_millis(300));
        ensure!(is_alive(i32::try_from(pid)?), "it has ended");
        lengths.push(fs::metadata(&log)?.len());
        sandbox.start_daemon()?;
        std::thread::sleep(Duration::from_millis(20));
    }
    until("all of it is there", || {
        Ok(fs::read_to_string(&log)?.ends_with(&format!("line {LINES}\n")))
    })
    .with_context(|| format!("{lengths:?}: {}", sandbox.daemon_log()))?;
    crate::terminals::ensure_repeats_at_most(&fs::read_to_string(&log)?, LINES, 3)?;
    ensure!(
        !bundle.path().join("rootfs/broken").exists(),
        "it got EPIPE"
    );
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
    let shim = Shim::connect(&sandbox)?;
    ensure!(
        shim.wait("c")? == 137 && shim.delete("c")? == 137,
        "not 137"
    );
    Ok(())
}

fn finished_execs_hold_no_descriptors(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = start(stage)?;
    let before = Footprint::of(&sandbox);
    sleeping(&sandbox, &shim)?;
    let count = |pid: Option<i32>| -> anyhow::Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", pid.context("not there")?))?.count())
    };
    let counts = || anyhow::Ok((count(sandbox.daemon_pid())?, count(sandbox.keeper_pid())?));
    let idle = counts()?;
    for number in 0..30 {
        let exec = format!("e{number}");
        let reader = Reader::new(&sandbox, &exec)?;
        shim.exec_with("c", &exec, &["sh", "-c", "echo said"], |request| {
            request.stdout = reader.path();
        })?;
        shim.start_exec("c", &exec)?;
        shim.wait_exec("c", &exec)?;
        // As `nerdctl exec --detach`: nothing deletes it.
    }
    until("their descriptors are closed", || {
        let now = counts()?;
        // Connections to look with come and go.
        Ok(now.0 <= idle.0 + 4 && now.1 <= idle.1 + 4)
    })?;
    end(&sandbox, &shim, &before)
}

fn an_execs_child_that_holds_the_output_is_waited_for_two_seconds(
    stage: &Stage,
) -> anyhow::Result<()> {
    let (sandbox, shim) = start(stage)?;
    let before = Footprint::of(&sandbox);
    sleeping(&sandbox, &shim)?;
    let mut reader = Reader::new(&sandbox, "out")?;
    let script = "(sleep 1; echo late; sleep 100) & echo early; exit 7";
    shim.exec_with("c", "e", &["sh", "-c", script], |request| {
        request.stdout = reader.path();
    })?;
    shim.start_exec("c", "e")?;
    ensure!(shim.wait_exec("c", "e")? == 7, "not 7");
    sandbox.kill_daemon()?;
    let asked = Instant::now();
    shim.delete_exec("c", "e")?;
    let took = asked.elapsed();
    ensure!(
        (1500..8000).contains(&took.as_millis()),
        "Delete took {took:?}"
    );
    let text = reader.finish()?;
    ensure!(text == "early\nlate\n", "{text:?}");
    end(&sandbox, &shim, &before)
}

fn a_client_that_never_reads_holds_up_its_process_and_nothing_else(
    stage: &Stage,
) -> anyhow::Result<()> {
    let (sandbox, shim) = start(stage)?;
    let before = Footprint::of(&sandbox);
    let bundle = Bundle::new(
        &sandbox,
        "c",
        &[
            "sh",
            "-c",
            "busybox seq 1000000 | busybox tee /dev/shm/copy",
        ],
    )?;
    let fifo = sandbox.directory().join("out");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU)?;
    let pid = shim.create_with("c", bundle.path(), |request| {
        request.stdout = fifo.to_string_lossy().into_owned();
    })?;
    shim.start("c")?;
    let copy = PathBuf::from(format!("/proc/{pid}/root/dev/shm/copy"));
    let length = || fs::metadata(&copy).map_or(0, |copy| copy.len());
    let mut last = 0;
    until("it waits", || {
        std::thread::sleep(Duration::from_millis(200));
        let now = length();
        // Less has no reason to wait but a busy machine.
        Ok(now > 60_000 && now == std::mem::replace(&mut last, now))
    })?;
    // A few small pipes (344,064 bytes were seen); those of 1 MiB are for what flows.
    ensure!(last < 600_000, "{last} bytes were taken");
    let other = Bundle::new(&sandbox, "other", &["sh", "-c", "echo here"])?;
    let mut reader = Reader::new(&sandbox, "other-out")?;
    shim.create_with("other", other.path(), |request| {
        request.stdout = reader.path();
    })?;
    shim.start("other")?;
    ensure!(reader.finish()? == "here\n", "not heard");
    ensure!(
        shim.wait("other")? == 0 && shim.delete("other")? == 0,
        "not 0"
    );
    // It comes back, and nothing is lost.
    let mut reader = Reader::of(fifo);
    let text = reader.finish()?;
    let is_whole = text
        .lines()
        .eq((1..=1_000_000).map(|number| number.to_string()));
    ensure!(is_whole, "{} bytes came", text.len());
    ensure!(shim.wait("c")? == 0 && shim.delete("c")? == 0, "not 0");
    before.wait_for_return(&sandbox)
}

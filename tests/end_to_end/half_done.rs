//! What a daemon was about when it was killed, and what its successor makes of it: requests, calls
//! of the runtime, terminals, inputs. All of it is asked for on one connection, as containerd
//! would, which never notices.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::thread::{ScopedJoinHandle, scope};

use anyhow::{Context, ensure};
use containerd_shim_protos::api;
use embedshim_tests::{Bundle, Footprint, Reader, Shim, Stage, Test, binary_name, write_program};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use testbed::sandbox::{Sandbox, is_alive, until};

use crate::tests;

pub(crate) const TESTS: [Test; 11] = tests!(WithoutContainerd:
    a_create_under_way_is_answered,
    a_start_under_way_is_answered,
    a_start_that_was_done_is_answered_and_not_done_again,
    an_exec_under_way_is_started_once_and_its_code_is_known,
    a_delete_under_way_is_answered_with_the_code,
    a_pause_under_way_is_finished,
    a_terminal_goes_on_under_the_next_daemon,
    a_terminal_that_is_handed_over_while_nobody_is_there_is_taken,
    input_does_not_end_with_a_daemon,
    input_that_ended_before_the_start_ends_under_the_next_daemon_too,
    a_creation_that_was_cut_short_has_one_logger_in_the_end,
);

/// A runtime that stops within one of its calls until it is let go.
pub(crate) struct SlowRuntime<'a> {
    sandbox: &'a Sandbox,
    program: PathBuf,
}

impl<'a> SlowRuntime<'a> {
    /// It stops before or after `runc`'s call of this name, once.
    pub(crate) fn new(sandbox: &'a Sandbox, call: &str, is_after: bool) -> anyhow::Result<Self> {
        let directory = sandbox.directory();
        let program = directory.join("slow-runc");
        let (first, then) = if is_after {
            ("runc \"$@\"; code=$?", "exit $code")
        } else {
            ("true", "exec runc \"$@\"")
        };
        let script = format!(
            "#!/bin/sh\ncd {0}\necho \"$@\" >> calls\nfor word in \"$@\"; do\n\
             if [ \"$word\" = {call} ] && mkdir once 2>/dev/null; then\n\
             {first}\ntouch going\nwhile [ -e going ]; do sleep 0.02; done\nrm fail 2>/dev/null && exit 1\n{then}\nfi\ndone\nexec runc \"$@\"\n",
            directory.display()
        );
        write_program(&program, &script)?;
        Ok(Self { sandbox, program })
    }

    pub(crate) fn create(&self, shim: &Shim, bundle: &Bundle) -> ttrpc::Result<u32> {
        shim.create_with("c", bundle.path(), |request| self.choose(request))
    }

    pub(crate) fn choose(&self, request: &mut api::CreateTaskRequest) {
        request.options = binary_name(&self.program);
    }

    /// Kills the daemon while the runtime is in the call, lets the call go on under the next one,
    /// and returns what the request gets.
    pub(crate) fn kill_within<T>(
        &self,
        request: ScopedJoinHandle<'_, ttrpc::Result<T>>,
    ) -> anyhow::Result<ttrpc::Result<T>> {
        let going = self.sandbox.directory().join("going");
        until("the runtime is in its call", || Ok(going.exists()))?;
        self.sandbox.kill_daemon()?;
        ensure!(!request.is_finished(), "the request has an answer already");
        fs::remove_file(&going)?;
        join(request)
    }
}

pub(crate) fn join<T>(request: ScopedJoinHandle<'_, T>) -> anyhow::Result<T> {
    request
        .join()
        .map_err(|_| anyhow::anyhow!("a request panicked"))
}

pub(crate) fn start(stage: &Stage) -> anyhow::Result<(Sandbox, Shim)> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    Ok((sandbox, shim))
}

pub(crate) fn terminal(bundle: &Bundle) -> anyhow::Result<()> {
    bundle.edit(|spec| {
        if let Some(terminal) = spec.pointer_mut("/process/terminal") {
            *terminal = true.into();
        }
    })
}

pub(crate) fn fifo(sandbox: &Sandbox, name: &str) -> anyhow::Result<PathBuf> {
    let path = sandbox.directory().join(name);
    mkfifo(&path, Mode::S_IRWXU)?;
    Ok(path)
}

/// Ends it, and looks whether everything is gone.
pub(crate) fn end(sandbox: &Sandbox, shim: &Shim, before: &Footprint) -> anyhow::Result<()> {
    shim.kill("c", Signal::SIGKILL)?;
    ensure!(
        shim.wait("c")? == 137 && shim.delete("c")? == 137,
        "not 137"
    );
    before.wait_for_return(sandbox)
}

fn a_create_under_way_is_answered(stage: &Stage) -> anyhow::Result<()> {
    for is_after in [false, true] {
        let (sandbox, shim) = start(stage)?;
        let runtime = SlowRuntime::new(&sandbox, "create", is_after)?;
        let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
        let before = Footprint::of(&sandbox);
        let pid =
            scope(|scope| runtime.kill_within(scope.spawn(|| runtime.create(&shim, &bundle))))??;
        ensure!(shim.start("c")? == pid, "another pid");
        end(&sandbox, &shim, &before)?;
    }
    Ok(())
}

fn a_start_under_way_is_answered(stage: &Stage) -> anyhow::Result<()> {
    for is_after in [false, true] {
        let (sandbox, shim) = start(stage)?;
        let runtime = SlowRuntime::new(&sandbox, "start", is_after)?;
        // It may have ended before it is looked at.
        let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", "exit 7"])?;
        let before = Footprint::of(&sandbox);
        let created = runtime.create(&shim, &bundle)?;
        let waiting = Shim::connect(&sandbox)?;
        scope(|scope| {
            let wait = scope.spawn(|| waiting.wait("c"));
            let started = runtime.kill_within(scope.spawn(|| shim.start("c")))??;
            ensure!(started == created, "another pid");
            ensure!(join(wait)?? == 7, "not 7");
            anyhow::Ok(())
        })?;
        ensure!(shim.delete("c")? == 7, "not 7");
        before.wait_for_return(&sandbox)?;
    }
    Ok(())
}

/// Two starts: the one that was carried out is answered as such, the other is refused as ever.
fn a_start_that_was_done_is_answered_and_not_done_again(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = start(stage)?;
    let runtime = SlowRuntime::new(&sandbox, "start", true)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let before = Footprint::of(&sandbox);
    let created = runtime.create(&shim, &bundle)?;
    let other = Shim::connect(&sandbox)?;
    scope(|scope| {
        let first = scope.spawn(|| shim.start("c"));
        until("the runtime is in its call", || {
            Ok(sandbox.directory().join("going").exists())
        })?;
        let second = scope.spawn(|| other.start("c"));
        ensure!(runtime.kill_within(first)?? == created, "another pid");
        let refusal = join(second)?.map_or_else(|error| error.to_string(), |pid| pid.to_string());
        ensure!(
            refusal.contains("cannot start a running process"),
            "{refusal}"
        );
        anyhow::Ok(())
    })?;
    end(&sandbox, &shim, &before)
}

/// Before: it has to be started. After: it runs, or has ended while no daemon knew of it,
/// and must not be started again.
fn an_exec_under_way_is_started_once_and_its_code_is_known(stage: &Stage) -> anyhow::Result<()> {
    for is_after in [false, true] {
        let (sandbox, shim) = start(stage)?;
        let runtime = SlowRuntime::new(&sandbox, "exec", is_after)?;
        let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
        let before = Footprint::of(&sandbox);
        runtime.create(&shim, &bundle)?;
        shim.start("c")?;
        let script =
            "echo once >> /dev/shm/count; exit $((22 + $(busybox wc -l < /dev/shm/count)))";
        shim.exec_with("c", "e", &["busybox", "sh", "-c", script], |_| {})?;
        let waiting = Shim::connect(&sandbox)?;
        scope(|scope| {
            let wait = scope.spawn(|| waiting.wait_exec("c", "e"));
            let pid = runtime.kill_within(scope.spawn(|| shim.start_exec("c", "e")))??;
            ensure!(pid > 0, "no pid");
            let code = join(wait)??;
            ensure!(code == 23, "{code}");
            anyhow::Ok(())
        })?;
        end(&sandbox, &shim, &before)?;
    }
    Ok(())
}

fn a_delete_under_way_is_answered_with_the_code(stage: &Stage) -> anyhow::Result<()> {
    for is_after in [false, true] {
        let (sandbox, shim) = start(stage)?;
        let runtime = SlowRuntime::new(&sandbox, "delete", is_after)?;
        let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", "exit 9"])?;
        let before = Footprint::of(&sandbox);
        runtime.create(&shim, &bundle)?;
        shim.start("c")?;
        ensure!(shim.wait("c")? == 9, "not 9");
        let code = scope(|scope| runtime.kill_within(scope.spawn(|| shim.delete("c"))))??;
        ensure!(code == 9, "{code}");
        ensure!(shim.state("c").is_err(), "it is still there");
        before.wait_for_return(&sandbox)?;
    }
    Ok(())
}

fn a_pause_under_way_is_finished(stage: &Stage) -> anyhow::Result<()> {
    for is_after in [false, true] {
        let (sandbox, shim) = start(stage)?;
        let runtime = SlowRuntime::new(&sandbox, "pause", is_after)?;
        let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
        let before = Footprint::of(&sandbox);
        runtime.create(&shim, &bundle)?;
        shim.start("c")?;
        let request = api::PauseRequest {
            id: "c".into(),
            ..api::PauseRequest::default()
        };
        scope(|scope| {
            runtime.kill_within(scope.spawn(|| shim.tasks.pause(shim.metadata(), &request)))
        })??;
        let status = shim.state("c")?.status();
        ensure!(status == api::Status::PAUSED, "{status:?}");
        let request = api::ResumeRequest {
            id: "c".into(),
            ..api::ResumeRequest::default()
        };
        shim.tasks.resume(shim.metadata(), &request)?;
        end(&sandbox, &shim, &before)?;
    }
    Ok(())
}

fn a_terminal_goes_on_under_the_next_daemon(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = start(stage)?;
    let script = "while read line; do echo \"got $line\"; [ $line = end ] && exit 5; done";
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", script])?;
    terminal(&bundle)?;
    let (stdin, stdout) = (fifo(&sandbox, "in")?, fifo(&sandbox, "out")?);
    let before = Footprint::of(&sandbox);
    let output = Reader::of(stdout.clone());
    shim.create_with("c", bundle.path(), |request| {
        request.terminal = true;
        request.stdin = stdin.to_string_lossy().into_owned();
        request.stdout = stdout.to_string_lossy().into_owned();
    })?;
    shim.start("c")?;
    let mut input = OpenOptions::new().write(true).open(&stdin)?;
    for line in ["one", "two", "three"] {
        writeln!(input, "{line}")?;
        output.wait_for(&format!("got {line}"))?;
        sandbox.kill_daemon()?;
    }
    let size = api::ResizePtyRequest {
        id: "c".into(),
        width: 100,
        height: 30,
        ..api::ResizePtyRequest::default()
    };
    shim.tasks.resize_pty(shim.metadata(), &size)?;
    writeln!(input, "end")?;
    output.wait_for("got end")?;
    ensure!(shim.wait("c")? == 5 && shim.delete("c")? == 5, "not 5");
    before.wait_for_return(&sandbox)
}

fn a_terminal_that_is_handed_over_while_nobody_is_there_is_taken(
    stage: &Stage,
) -> anyhow::Result<()> {
    let (sandbox, shim) = start(stage)?;
    let runtime = SlowRuntime::new(&sandbox, "exec", false)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let stdout = fifo(&sandbox, "out")?;
    let before = Footprint::of(&sandbox);
    runtime.create(&shim, &bundle)?;
    shim.start("c")?;
    let output = Reader::of(stdout.clone());
    let script = "test -t 1 && echo on a terminal; exit 6";
    shim.exec_with("c", "e", &["sh", "-c", script], |request| {
        request.terminal = true;
        request.stdout = stdout.to_string_lossy().into_owned();
    })?;
    scope(|scope| runtime.kill_within(scope.spawn(|| shim.start_exec("c", "e"))))??;
    output.wait_for("on a terminal")?;
    ensure!(shim.wait_exec("c", "e")? == 6, "not 6");
    end(&sandbox, &shim, &before)
}

fn input_does_not_end_with_a_daemon(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = start(stage)?;
    let bundle = Bundle::new(&sandbox, "c", &["busybox", "cat"])?;
    let (stdin, stdout) = (fifo(&sandbox, "in")?, fifo(&sandbox, "out")?);
    let before = Footprint::of(&sandbox);
    let output = Reader::of(stdout.clone());
    shim.create_with("c", bundle.path(), |request| {
        request.stdin = stdin.to_string_lossy().into_owned();
        request.stdout = stdout.to_string_lossy().into_owned();
    })?;
    shim.start("c")?;
    for line in ["one", "two"] {
        // The client is gone right afterwards: our writer alone keeps the input open.
        fs::write(&stdin, format!("{line}\n"))?;
        output.wait_for(line)?;
        sandbox.kill_daemon()?;
    }
    ensure!(
        shim.state("c")?.status() == api::Status::RUNNING,
        "its input has ended"
    );
    shim.close_stdin("c")?;
    ensure!(shim.wait("c")? == 0 && shim.delete("c")? == 0, "not 0");
    before.wait_for_return(&sandbox)
}

/// `echo hi | ctr run ... cat`: the client has written and left before the start, and sends no
/// `CloseIO`.
fn input_that_ended_before_the_start_ends_under_the_next_daemon_too(
    stage: &Stage,
) -> anyhow::Result<()> {
    let (sandbox, shim) = start(stage)?;
    let bundle = Bundle::new(&sandbox, "c", &["busybox", "cat"])?;
    let (stdin, stdout) = (fifo(&sandbox, "in")?, fifo(&sandbox, "out")?);
    let before = Footprint::of(&sandbox);
    let output = Reader::of(stdout.clone());
    shim.create_with("c", bundle.path(), |request| {
        request.stdin = stdin.to_string_lossy().into_owned();
        request.stdout = stdout.to_string_lossy().into_owned();
    })?;
    fs::write(&stdin, "hi\n")?;
    sandbox.kill_daemon()?;
    shim.start("c")?;
    output.wait_for("hi")?;
    ensure!(shim.wait("c")? == 0 && shim.delete("c")? == 0, "not 0");
    before.wait_for_return(&sandbox)
}

/// One logger is left, that of the container.
fn a_creation_that_was_cut_short_has_one_logger_in_the_end(stage: &Stage) -> anyhow::Result<()> {
    for is_after in [false, true] {
        let (sandbox, shim) = start(stage)?;
        let runtime = SlowRuntime::new(&sandbox, "create", is_after)?;
        let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", "echo said; exit 7"])?;
        let logger = sandbox.directory().join("logger");
        let directory = sandbox.directory().display();
        let script = format!(
            "#!/bin/sh\nPATH=/bin:/usr/bin\necho $$ >> {directory}/begun\nexec 5>&-\ncat <&3 >> {directory}/log\n"
        );
        write_program(&logger, &script)?;
        let before = Footprint::of(&sandbox);
        let create = || {
            shim.create_with("c", bundle.path(), |request| {
                runtime.choose(request);
                request.stdout = format!("binary://{}", logger.display());
            })
        };
        if !is_after {
            fs::write(sandbox.directory().join("fail"), "")?;
        }
        scope(|scope| runtime.kill_within(scope.spawn(create)))??;
        let lines = |name: &str| -> Vec<String> {
            let text = fs::read_to_string(sandbox.directory().join(name)).unwrap_or_default();
            text.lines().map(str::to_owned).collect()
        };
        let loggers = || -> Vec<i32> {
            let begun = lines("begun");
            begun.iter().filter_map(|pid| pid.parse().ok()).collect()
        };
        if is_after {
            // The container is made: it is taken over, with its logger.
            ensure!(loggers().len() == 1, "{:?}", loggers());
        } else {
            ensure!(loggers().len() == 2, "{:?}", loggers());
            until("the first has ended", || Ok(!is_alive(loggers()[0])))?;
        }
        let last = *loggers().last().context("no logger")?;
        ensure!(is_alive(last), "the container has no logger");
        shim.start("c")?;
        ensure!(shim.wait("c")? == 7 && shim.delete("c")? == 7, "not 7");
        until("the last has ended", || Ok(!is_alive(last)))?;
        ensure!(lines("log") == ["said"], "{:?}", lines("log"));
        before.wait_for_return(&sandbox)?;
    }
    Ok(())
}

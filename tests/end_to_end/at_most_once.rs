//! An exec whose daemon and runtime are killed together, as `systemctl kill` or the OOM killer do:
//! what the runtime has started it has told no one. It runs at most once, whatever is known of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::{scope, sleep};
use std::time::Duration;

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Footprint, Reader, Shim, Stage, Test, binary_name, write_program};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use testbed::sandbox::{Sandbox, stop, until};

use crate::half_done::{SlowRuntime, join};
use crate::tests;

pub(crate) const TESTS: [Test; 6] = tests!(WithoutContainerd:
    an_exec_that_outlives_daemon_and_runtime_is_found_with_its_streams,
    an_exec_without_streams_that_outlives_daemon_and_runtime_is_found,
    an_exec_that_may_have_run_is_not_started_again,
    an_exec_whose_runtime_has_said_why_it_failed_is_refused_with_that,
    a_runtime_that_is_frozen_goes_on_after_daemon_and_keeper,
    execs_run_once_each_at_whatever_moment_of_their_start_the_daemon_is_killed,
);

/// Says what it is, and is told when to end.
const LIVING: &str = "echo once >> /dev/shm/count; echo first; \
     while [ ! -e /dev/shm/end ]; do busybox usleep 20000; done; \
     exit $((20 + $(busybox wc -l < /dev/shm/count)))";

/// A runtime that is killed between an exec's first instruction and its pid file.
struct CutShort {
    program: PathBuf,
    pid: PathBuf,
}

impl CutShort {
    fn new(sandbox: &Sandbox) -> anyhow::Result<Self> {
        let directory = sandbox.directory();
        let (program, pid) = (directory.join("cut-short-runc"), directory.join("wrapper"));
        let script = format!(
            "#!/bin/sh\n\
             case \" $* \" in *\" exec \"*) ;; *) exec runc \"$@\" ;; esac\n\
             [ -e {0} ] && exec runc \"$@\"\n\
             left=$#\n\
             while [ $left -gt 0 ]; do\n\
             word=$1; shift; [ \"$before\" = --pid-file ] && word={1}/hidden\n\
             set -- \"$@\" \"$word\"; before=$word; left=$((left-1))\n\
             done\n\
             runc \"$@\"\n\
             echo $$ > {0}.draft; mv {0}.draft {0}\n\
             while :; do sleep 0.02; done\n",
            pid.display(),
            directory.display()
        );
        write_program(&program, &script)?;
        Ok(Self { program, pid })
    }

    /// Starts the exec `e` of `c`, kills the daemon and then this runtime when the process runs,
    /// and returns the answer.
    fn start(&self, sandbox: &Sandbox, shim: &Shim) -> anyhow::Result<ttrpc::Result<u32>> {
        scope(|scope| {
            let request = scope.spawn(|| shim.start_exec("c", "e"));
            until("the process runs", || Ok(self.pid.exists()))?;
            sandbox.kill_daemon()?;
            ensure!(!request.is_finished(), "the request has an answer already");
            let pid = fs::read_to_string(&self.pid)?.trim().parse()?;
            kill(Pid::from_raw(pid), Signal::SIGKILL)?;
            request.join().ok().context("a request panicked")
        })
    }
}

struct Scene {
    sandbox: Sandbox,
    shim: Shim,
    runtime: CutShort,
    before: Footprint,
    memory: PathBuf,
}

/// A container whose runtime will be cut short, and whose `/dev/shm` can be seen from outside.
fn scene(stage: &Stage) -> anyhow::Result<Scene> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let runtime = CutShort::new(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let before = Footprint::of(&sandbox);
    let pid = shim.create_with("c", bundle.path(), |request| {
        request.options = binary_name(&runtime.program);
    })?;
    shim.start("c")?;
    let memory = Path::new("/proc").join(format!("{pid}/root/dev/shm"));
    Ok(Scene {
        sandbox,
        shim,
        runtime,
        before,
        memory,
    })
}

impl Scene {
    fn runs(&self) -> usize {
        let count = fs::read_to_string(self.memory.join("count")).unwrap_or_default();
        count.lines().count()
    }

    fn end(&self) -> anyhow::Result<()> {
        self.shim.kill("c", Signal::SIGKILL)?;
        ensure!(self.shim.wait("c")? == 137, "not 137");
        ensure!(self.shim.delete("c")? == 137, "not 137");
        self.before.wait_for_return(&self.sandbox)
    }
}

fn an_exec_that_outlives_daemon_and_runtime_is_found_with_its_streams(
    stage: &Stage,
) -> anyhow::Result<()> {
    let scene = scene(stage)?;
    let (shim, sandbox) = (&scene.shim, &scene.sandbox);
    let stdout = sandbox.directory().join("out");
    mkfifo(&stdout, Mode::S_IRWXU)?;
    let output = Reader::of(stdout.clone());
    // One whose start is not in question must not be taken for it.
    shim.exec_with("c", "other", &["sleep", "1000"], |_| {})?;
    fs::write(&scene.runtime.pid, "")?;
    shim.start_exec("c", "other")?;
    fs::remove_file(&scene.runtime.pid)?;
    let script = format!("{LIVING}; echo unreachable");
    shim.exec_with("c", "e", &["sh", "-c", &script], |request| {
        request.stdout = stdout.to_string_lossy().into_owned();
    })?;
    let pid = scene.runtime.start(sandbox, shim)??;
    ensure!(pid > 0, "no pid");
    output.wait_for("first")?;
    fs::write(scene.memory.join("end"), "")?;
    let code = shim.wait_exec("c", "e")?;
    ensure!(code == 21, "{code}");
    ensure!(shim.delete_exec("c", "e")? == 21, "not 21");
    ensure!(scene.runs() == 1, "it has run {} times", scene.runs());
    scene.end()
}

fn an_exec_without_streams_that_outlives_daemon_and_runtime_is_found(
    stage: &Stage,
) -> anyhow::Result<()> {
    let scene = scene(stage)?;
    let shim = &scene.shim;
    shim.exec_with("c", "e", &["sh", "-c", LIVING], |_| {})?;
    scene.runtime.start(&scene.sandbox, shim)??;
    fs::write(scene.memory.join("end"), "")?;
    let code = shim.wait_exec("c", "e")?;
    ensure!(code == 21, "{code}");
    ensure!(scene.runs() == 1, "it has run {} times", scene.runs());
    scene.end()
}

/// It has ended, and nothing tells that it ever was: the client decides what to do about that.
fn an_exec_that_may_have_run_is_not_started_again(stage: &Stage) -> anyhow::Result<()> {
    let scene = scene(stage)?;
    let shim = &scene.shim;
    let script = "echo once >> /dev/shm/count";
    shim.exec_with("c", "e", &["sh", "-c", script], |_| {})?;
    let waiting = Shim::connect(&scene.sandbox)?;
    let answer = scope(|scope| {
        let wait = scope.spawn(|| waiting.wait_exec("c", "e"));
        let answer = scene.runtime.start(&scene.sandbox, shim)?;
        wait.join().ok().context("a request panicked")??;
        anyhow::Ok(answer)
    })?;
    // Nor if it is asked for again, by this daemon or the next.
    scene.sandbox.kill_daemon()?;
    for answer in [answer, shim.start_exec("c", "e")] {
        let text = answer.map_or_else(|error| error.to_string(), |pid| pid.to_string());
        ensure!(text.contains("exec e may have run"), "{text}");
    }
    ensure!(scene.runs() == 1, "it has run {} times", scene.runs());
    shim.delete_exec("c", "e")?;
    scene.end()
}

/// The kernel hangs up on a process group that loses its session's last other process, if one of
/// the group is stopped.
fn a_runtime_that_is_frozen_goes_on_after_daemon_and_keeper(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let directory = sandbox.directory();
    let (program, pid) = (directory.join("frozen-runc"), directory.join("wrapper"));
    let go = directory.join("go");
    // It does not stop itself: that could come after it was told to go on.
    let script = format!(
        "#!/bin/sh\n\
         case \" $* \" in *\" exec \"*) echo $$ > {0}.draft; mv {0}.draft {0}\n\
         while [ ! -e {1} ]; do sleep 0.05; done ;; esac\n\
         exec runc \"$@\"\n",
        pid.display(),
        go.display()
    );
    write_program(&program, &script)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    shim.create_with("c", bundle.path(), |request| {
        request.options = binary_name(&program);
    })?;
    shim.start("c")?;
    shim.exec_with("c", "e", &["sh", "-c", "exit 7"], |_| {})?;
    scope(|scope| {
        let start = scope.spawn(|| shim.start_exec("c", "e"));
        until("the runtime is called", || Ok(pid.exists()))?;
        let runtime = Pid::from_raw(fs::read_to_string(&pid)?.trim().parse()?);
        stop(runtime)?;
        let daemon = sandbox.kill_daemon()?;
        sandbox.end_keeper()?;
        sandbox.successor_of(daemon)?;
        ensure!(!start.is_finished(), "it is answered already");
        fs::write(&go, "")?;
        kill(runtime, Signal::SIGCONT).context("the runtime is gone")?;
        join(start)??;
        anyhow::Ok(())
    })?;
    ensure!(shim.wait_exec("c", "e")? == 7, "not 7");
    shim.delete_exec("c", "e")?;
    shim.kill("c", Signal::SIGKILL)?;
    ensure!(
        shim.wait("c")? == 137 && shim.delete("c")? == 137,
        "not 137"
    );
    Ok(())
}

/// It has not run, so it is asked of the runtime again.
fn an_exec_whose_runtime_has_said_why_it_failed_is_refused_with_that(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let runtime = SlowRuntime::new(&sandbox, "exec", true)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    shim.create_with("c", bundle.path(), |request| runtime.choose(request))?;
    shim.start("c")?;
    shim.exec_with("c", "e", &["/missing"], |_| {})?;
    let answer = scope(|scope| runtime.kill_within(scope.spawn(|| shim.start_exec("c", "e"))))?;
    let refusal = answer.map_or_else(|error| error.to_string(), |pid| pid.to_string());
    ensure!(refusal.contains("OCI runtime exec failed"), "{refusal}");
    Ok(())
}

/// A millisecond later in each round; the runtime lives on, and so the start succeeds.
fn execs_run_once_each_at_whatever_moment_of_their_start_the_daemon_is_killed(
    stage: &Stage,
) -> anyhow::Result<()> {
    const ROUNDS: u64 = 24;
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let pid = shim.create("c", bundle.path())?;
    shim.start("c")?;
    let rounds = std::env::var("EMBEDSHIM_ROUNDS").ok();
    let rounds = rounds
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(ROUNDS);
    for round in 0..rounds {
        let id = format!("e{round}");
        let script = format!("echo $$ >> /dev/shm/{id}; exit 6");
        shim.exec_with("c", &id, &["sh", "-c", &script], |_| {})?;
        scope(|scope| {
            let request = scope.spawn(|| shim.start_exec("c", &id));
            // As long as an exec takes, and a little more.
            sleep(Duration::from_millis(round * 3 % 70 + round % 3));
            sandbox.kill_daemon()?;
            request.join().ok().context("a request panicked")??;
            anyhow::Ok(())
        })
        .with_context(|| format!("round {round}: {}", sandbox.daemon_log()))?;
        ensure!(shim.wait_exec("c", &id)? == 6, "round {round}: not 6");
        let runs = fs::read_to_string(format!("/proc/{pid}/root/dev/shm/{id}"))?;
        ensure!(
            runs.lines().count() == 1,
            "round {round}: {runs:?}: {}",
            sandbox.daemon_log()
        );
        shim.delete_exec("c", &id)?;
    }
    Ok(())
}

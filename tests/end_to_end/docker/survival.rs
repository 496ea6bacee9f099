//! Docker's containers while dockerd, containerd or the daemon dies.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::Duration;

use anyhow::{Context, ensure};
use embedshim_tests::{Docker, Footprint, Stage, Test, ensure_counted};
use nix::sys::signal::Signal;
use testbed::sandbox::{Running, is_alive, until};

use super::counted;
use crate::tests;

pub(crate) const TESTS: [Test; 2] = tests!(AnyRuntime:
    containers_outlive_dockerd,
    dockers_containers_outlive_containerd,
);
pub(crate) const OURS: [Test; 2] = tests!(EmbedshimOnly:
    docker_has_each_code_and_byte_while_the_daemon_is_killed,
    docker_follows_a_log_while_the_daemon_is_killed,
);

/// Runs under kills of the daemon, in the ordinary suite.
const FEW: usize = 6;
/// The same in full: the variable has their number.
const RUNS: &str = "EMBEDSHIM_TEST_DOCKER_RUNS";

/// dockerd's live-restore. Nothing is written at the instant of the kill: what dockerd has read by
/// then and not written is lost with it.
fn containers_outlive_dockerd(stage: &Stage) -> anyhow::Result<()> {
    let mut docker = Docker::start(stage)?;
    let flags = docker.sandbox().directory().join("flags");
    fs::create_dir_all(&flags)?;
    let volume = format!("{}:/flags", flags.display());
    let script = "count() { i=$1; while [ $i -le $2 ]; do echo line $i; i=$((i+1)); done; }
        await() { until [ -e /flags/$1 ]; do busybox usleep 20000; done; }
        count 1 100; await middle; count 101 1100; echo > /flags/written; await end; count 1101 1200; exit 21";
    docker.detached("speaks", &["--volume", &volume], &["sh", "-c", script])?;
    let script = "until [ -e /flags/middle ]; do busybox usleep 20000; done; exit 22";
    docker.detached("ends", &["--volume", &volume], &["sh", "-c", script])?;
    docker.wait_for_log("speaks", "line 100\n")?;
    let pid: i32 = docker.inspect("ends", ".State.Pid")?.parse()?;
    docker.end_dockerd(Signal::SIGKILL)?;
    fs::write(flags.join("middle"), "")?;
    until("it has written", || Ok(flags.join("written").exists()))?;
    until("the other one has ended", || Ok(!is_alive(pid)))?;
    if docker.sandbox().daemon_pid().is_some() {
        docker.sandbox().kill_daemon()?;
    }
    docker.start_dockerd()?;
    ensure!(
        docker.wait("ends")? == 22,
        "the code of the one that has ended"
    );
    docker.wait_for_status("speaks", "running")?;
    docker.wait_for_log("speaks", "line 1100\n")?;
    fs::write(flags.join("end"), "")?;
    ensure!(docker.wait("speaks")? == 21, "the code of the other one");
    ensure_counted(&docker.ok(&["logs", "speaks"])?, "line", 1200)
}

fn dockers_containers_outlive_containerd(stage: &Stage) -> anyhow::Result<()> {
    let mut docker = Docker::start(stage)?;
    let script =
        "trap 'echo told; exit 23' TERM; echo ready; while :; do busybox usleep 20000; done";
    docker.detached("stays", &[], &["sh", "-c", script])?;
    docker.wait_for_log("stays", "ready")?;
    docker.sandbox_mut().kill_containerd()?;
    docker.sandbox_mut().start_containerd()?;
    // dockerd connects again after a while.
    let mut ran = None;
    until("docker exec works again", || {
        let exec = docker.command(&["exec", "stays", "sh", "-c", "echo here; exit 6"]);
        let finished = docker.finish(exec)?;
        let is_there = finished.stdout == "here\n";
        ran = Some(finished);
        Ok(is_there)
    })
    .with_context(|| format!("{ran:?}"))?;
    ensure!(
        ran.is_some_and(|ran| ran.code == Some(6)),
        "the exec's code"
    );
    docker.ok(&["stop", "--time", "20", "stays"])?;
    let code = docker.inspect("stays", ".State.ExitCode")?;
    let log = docker.ok(&["logs", "stays"])?;
    ensure!(code == "23" && log == "ready\ntold\n", "{code}: {log:?}");
    Ok(())
}

/// Kills the daemon again and again until the work is done, each fourth as soon as it serves. A
/// creation that is killed is undone and begun again, so that there has to be time for one now and
/// then.
fn while_the_daemon_is_killed<T: Send>(
    docker: &Docker,
    work: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<(T, u64)> {
    let is_done = AtomicBool::new(false);
    scope(|threads| {
        let killer = threads.spawn(|| {
            let mut kills: u64 = 0;
            while !is_done.load(Ordering::SeqCst) {
                docker.sandbox().kill_daemon()?;
                kills += 1;
                if !kills.is_multiple_of(4) {
                    sleep(Duration::from_millis(100 + kills * 377 % 1400));
                }
            }
            anyhow::Ok(kills)
        });
        let done = work();
        is_done.store(true, Ordering::SeqCst);
        let kills = killer
            .join()
            .map_err(|_| anyhow::anyhow!("the killer panicked"))?;
        Ok((done?, kills?))
    })
}

fn docker_has_each_code_and_byte_while_the_daemon_is_killed(stage: &Stage) -> anyhow::Result<()> {
    let docker = Docker::start(stage)?;
    let runs = std::env::var(RUNS).map_or(Ok(FEW), |number| number.parse())?;
    docker.detached("held", &[], &["sleep", "1000000"])?;
    let before = Footprint::of(docker.sandbox());
    let (faults, kills) = while_the_daemon_is_killed(&docker, || {
        let faults = scope(|threads| {
            let workers = [0, 1].map(|first| {
                let docker = &docker;
                threads.spawn(move || {
                    let own = (first..runs).step_by(2);
                    own.filter_map(|run| {
                        one_run(docker, run, kind_of(run))
                            .err()
                            .map(|e| format!("{e:#}"))
                    })
                    .collect::<Vec<_>>()
                })
            });
            workers.map(|worker| worker.join().unwrap_or_else(|_| vec!["panicked".into()]))
        });
        Ok(faults.concat())
    })?;
    println!(
        "docker: {runs} runs, {kills} kills, {} faults",
        faults.len()
    );
    ensure!(faults.is_empty(), "{kills} kills; {}", faults.join("\n"));
    ensure!(kills > 1, "the daemon was killed {kills} times");
    before.wait_for_return(docker.sandbox())
}

/// What is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Run,
    Exec,
    Input,
}

fn kind_of(run: usize) -> Kind {
    match run % 3 {
        0 => Kind::Run,
        1 => Kind::Exec,
        _ => Kind::Input,
    }
}

/// A container, an exec or a container with an input, by turns: with a code, an output and an error
/// output of its own.
fn one_run(docker: &Docker, run: usize, kind: Kind) -> anyhow::Result<()> {
    let code = i32::try_from(run % 100)? + 1;
    let count = 200 + run;
    let rest = format!(
        "busybox usleep {pause}
         i=1; while [ $i -le {count} ]; do echo err $i >&2; i=$((i+1)); done; exit {code}",
        pause = (run % 7) * 50_000
    );
    let counts = format!("i=1; while [ $i -le {count} ]; do echo out $i; i=$((i+1)); done; {rest}");
    let output = counted("out ", count);
    let ran = match kind {
        Kind::Run => docker.run(&["--rm"], &["sh", "-c", &counts])?,
        Kind::Exec => {
            let script = format!("echo $$ >> /tmp/{run}; {counts}");
            docker.finish(docker.command(&["exec", "held", "sh", "-c", &script]))?
        }
        Kind::Input => {
            let script = format!("cat; {rest}");
            let cat = docker.run_command(&["--rm", "--interactive"], &["sh", "-c", &script]);
            docker.finish_fed(cat, &output)?
        }
    };
    ensure!(
        ran.code == Some(code),
        "run {run}: {:?} for {code}: {}",
        ran.code,
        ran.stderr.lines().last().unwrap_or_default()
    );
    if kind == Kind::Exec {
        let pids = docker.ok(&["exec", "held", "cat", &format!("/tmp/{run}")])?;
        ensure!(pids.lines().count() == 1, "exec {run} ran as {pids:?}");
    }
    for (text, due) in [(ran.stdout, output), (ran.stderr, counted("err ", count))] {
        ensure!(
            text == due,
            "run {run}: {} bytes for {}, the last line is {:?}",
            text.len(),
            due.len(),
            text.lines().last()
        );
    }
    Ok(())
}

fn docker_follows_a_log_while_the_daemon_is_killed(stage: &Stage) -> anyhow::Result<()> {
    let docker = Docker::start(stage)?;
    let script = "i=0; while [ $i -lt 1000 ]; do i=$((i+1)); echo line $i; busybox usleep 1000; done; exit 9";
    docker.detached("counts", &[], &["sh", "-c", script])?;
    let mut follow = Running::capture(&mut docker.command(&["logs", "--follow", "counts"]))?;
    let (code, kills) = while_the_daemon_is_killed(&docker, || docker.wait("counts"))?;
    ensure!(code == 9, "{code} after {kills} kills");
    let followed = follow.finish(Duration::from_secs(30))?;
    ensure_counted(&followed.stdout, "line", 1000).with_context(|| format!("{kills} kills"))
}

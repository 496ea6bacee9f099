//! What Docker does with containers: run, exec, control, measure, restart.

use anyhow::ensure;
use embedshim_tests::{Docker, Footprint, Stage, Test, on_a_terminal};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::sandbox::until;

use super::counted;
use crate::tests;

pub(crate) const TESTS: [Test; 5] = tests!(AnyRuntime:
    a_docker_container_has_its_streams_and_its_code,
    a_docker_exec_has_its_streams_and_its_code,
    docker_controls_and_measures_its_containers,
    docker_ends_what_is_paused,
    docker_restarts_what_its_policy_says,
);
pub(crate) const OURS: [Test; 1] = tests!(EmbedshimOnly: docker_knows_what_ran_out_of_memory);

fn a_docker_container_has_its_streams_and_its_code(stage: &Stage) -> anyhow::Result<()> {
    let docker = Docker::start(stage)?;
    let host = ["--rm", "--network", "host"];
    let ran = docker.run(&host, &["sh", "-c", "exit 9"])?;
    ensure!(ran.code == Some(9), "{ran:?}");
    // dockerd keeps the host's network from now on.
    let before = Footprint::of(docker.sandbox());
    let script = "seq 20000; seq 3 >&2; exit 7";
    let ran = docker.run(&["--rm"], &["sh", "-c", script])?;
    let numbers = counted("", 20_000);
    ensure!(ran.code == Some(7), "{:?}: {}", ran.code, ran.stderr);
    ensure!(ran.stdout == numbers, "{} bytes came", ran.stdout.len());
    ensure!(ran.stderr == "1\n2\n3\n", "{:?}", ran.stderr);
    let cat = docker.run_command(&["--rm", "--interactive"], &["cat"]);
    let ran = docker.finish_fed(cat, &numbers)?;
    ensure!(
        ran.code == Some(0) && ran.stdout == numbers,
        "{:?}, {} of {} bytes: {}",
        ran.code,
        ran.stdout.len(),
        numbers.len(),
        ran.stderr
    );
    let typed = ["--rm", "--interactive", "--tty"];
    let typed = docker.run_command(
        &typed,
        &["sh", "-c", "tty; read word; echo got $word; exit 4"],
    );
    let ran = docker.finish_fed(on_a_terminal(&typed), "hello\n")?;
    ensure!(
        ran.code == Some(4) && ran.stdout.contains("/dev/pts/") && ran.stdout.contains("got hello"),
        "{ran:?}"
    );
    // dockerd makes these codes of the words in which the runtime's complaint comes.
    for (command, code) in [("nosuch", 127), ("/etc", 126)] {
        let ran = docker.run(&["--rm"], &[command])?;
        ensure!(ran.code == Some(code), "{command}: {ran:?}");
    }
    ensure!(
        docker.ok(&["ps", "--all", "--quiet"])?.is_empty(),
        "something is left"
    );
    before.wait_for_return(docker.sandbox())
}

fn a_docker_exec_has_its_streams_and_its_code(stage: &Stage) -> anyhow::Result<()> {
    let docker = Docker::start(stage)?;
    docker.detached("held", &[], &["sleep", "1000"])?;
    let script = "seq 5000; seq 3 >&2; exit 5";
    let ran = docker.finish(docker.command(&["exec", "held", "sh", "-c", script]))?;
    let numbers = counted("", 5000);
    ensure!(
        ran.code == Some(5) && ran.stdout == numbers && ran.stderr == "1\n2\n3\n",
        "{:?}, {} bytes: {}",
        ran.code,
        ran.stdout.len(),
        ran.stderr
    );
    let cat = docker.command(&["exec", "--interactive", "held", "cat"]);
    let ran = docker.finish_fed(cat, &numbers)?;
    ensure!(
        ran.code == Some(0) && ran.stdout == numbers,
        "{:?}, {} bytes: {}",
        ran.code,
        ran.stdout.len(),
        ran.stderr
    );
    let script = "tty; read word; echo got $word; exit 3";
    let typed = docker.command(&["exec", "--interactive", "--tty", "held", "sh", "-c", script]);
    let ran = docker.finish_fed(on_a_terminal(&typed), "hello\n")?;
    ensure!(
        ran.code == Some(3) && ran.stdout.contains("/dev/pts/") && ran.stdout.contains("got hello"),
        "{ran:?}"
    );
    let ran = docker.finish(docker.command(&["exec", "held", "nosuch"]))?;
    ensure!(
        matches!(ran.code, Some(126 | 127)) && ran.stdout.contains("nosuch")
            || ran.stderr.contains("nosuch"),
        "{ran:?}"
    );
    Ok(())
}

fn docker_controls_and_measures_its_containers(stage: &Stage) -> anyhow::Result<()> {
    let docker = Docker::start(stage)?;
    docker.detached("polite", &[], &["guest", "until-term", "33"])?;
    docker.wait_for_log("polite", "ready")?;
    docker.ok(&["pause", "polite"])?;
    docker.wait_for_status("polite", "paused")?;
    docker.ok(&["unpause", "polite"])?;
    docker.wait_for_status("polite", "running")?;
    let top = docker.ok(&["top", "polite"])?;
    ensure!(top.contains("guest until-term 33"), "{top}");
    let format = "{{.PIDs}} {{.MemPerc}}";
    let stats = docker.ok(&["stats", "--no-stream", "--format", format, "polite"])?;
    ensure!(stats.starts_with("1 "), "{stats}");
    docker.ok(&[
        "update",
        "--memory",
        "64m",
        "--memory-swap",
        "64m",
        "polite",
    ])?;
    docker.ok(&["stop", "--time", "20", "polite"])?;
    let code = docker.inspect("polite", ".State.ExitCode")?;
    ensure!(code == "33", "{code}");
    // The same container, once more.
    docker.ok(&["start", "polite"])?;
    docker.ok(&["kill", "polite"])?;
    ensure!(docker.wait("polite")? == 137, "not killed");
    docker.ok(&["rm", "polite"]).map(drop)
}

/// On cgroup v1 runc-v2 may miss it.
fn docker_knows_what_ran_out_of_memory(stage: &Stage) -> anyhow::Result<()> {
    let docker = Docker::start(stage)?;
    let limits = ["--memory", "16m", "--memory-swap", "16m"];
    docker.detached("greedy", &limits, &["busybox", "tail", "/dev/zero"])?;
    ensure!(docker.wait("greedy")? == 137, "not killed");
    let killed = docker.inspect("greedy", ".State.OOMKilled")?;
    ensure!(killed == "true", "OOMKilled: {killed}");
    docker.ok(&["rm", "greedy"])?;
    // `--until` counts whole seconds.
    let events = [
        "events",
        "--since",
        "10m",
        "--until",
        "0s",
        "--format",
        "{{.Action}}",
    ];
    let events = [&events[..], &["--filter", "container=greedy"]].concat();
    let mut told = String::new();
    until("its end is told", || {
        told = docker.ok(&events)?;
        Ok(told.contains("destroy"))
    })?;
    let told: Vec<&str> = told.lines().collect();
    ensure!(
        told == ["create", "start", "oom", "die", "destroy"],
        "{told:?}"
    );
    Ok(())
}

fn docker_restarts_what_its_policy_says(stage: &Stage) -> anyhow::Result<()> {
    let docker = Docker::start(stage)?;
    let failing = ["--restart", "on-failure:2"];
    docker.detached("failing", &failing, &["sh", "-c", "echo begun; exit 3"])?;
    until("it was started three times", || {
        let count = docker.inspect("failing", ".RestartCount")?;
        let status = docker.inspect("failing", ".State.Status")?;
        Ok(count == "2" && status == "exited")
    })?;
    let code = docker.inspect("failing", ".State.ExitCode")?;
    ensure!(code == "3", "{code}");
    let log = docker.ok(&["logs", "failing"])?;
    ensure!(log == "begun\n".repeat(3), "{log:?}");
    docker.detached("always", &["--restart", "always"], &["sleep", "1000"])?;
    let first: i32 = docker.inspect("always", ".State.Pid")?.parse()?;
    kill(Pid::from_raw(first), Signal::SIGKILL)?;
    until("it runs again", || {
        let pid: i32 = docker.inspect("always", ".State.Pid")?.parse()?;
        Ok(pid != 0 && pid != first)
    })?;
    docker.ok(&["restart", "--time", "0", "always"])?;
    docker.wait_for_status("always", "running")?;
    docker.ok(&["rm", "--force", "always"]).map(drop)
}

fn docker_ends_what_is_paused(stage: &Stage) -> anyhow::Result<()> {
    let docker = Docker::start(stage)?;
    let ends: [(&str, &[&str]); 2] = [
        ("killed", &["kill", "killed"]),
        ("stopped", &["stop", "--time", "1", "stopped"]),
    ];
    for (name, end) in ends {
        docker.detached(name, &[], &["sleep", "1000"])?;
        docker.ok(&["pause", name])?;
        docker.wait_for_status(name, "paused")?;
        docker.ok(end)?;
        ensure!(docker.wait(name)? == 137, "{name}: another code");
    }
    docker.detached("removed", &[], &["sleep", "1000"])?;
    docker.ok(&["pause", "removed"])?;
    docker.ok(&["rm", "--force", "removed"]).map(drop)
}

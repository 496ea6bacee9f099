//! Containers as `ctr` sees them: streams, terminals, execs, many at once.

use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use embedshim_tests::{Footprint, Stage, Test, on_a_terminal};
use testbed::sandbox::{PATIENCE, Running, Sandbox};

use crate::tests;

pub(crate) const TESTS: [Test; 11] = tests!(AnyRuntime:
    output_and_error_output_arrive_apart,
    large_output_right_before_the_exit_is_whole,
    input_reaches_the_container_and_ends,
    a_terminal_is_a_terminal,
    large_terminal_output_is_not_truncated,
    an_exec_has_its_own_output_and_exit_code,
    an_exec_reads_its_input,
    an_exec_can_have_a_terminal,
    sixty_four_containers_at_once,
    a_deleted_container_leaves_nothing,
    an_id_can_be_used_again,
);

fn finish(command: &mut Command) -> anyhow::Result<testbed::sandbox::Finished> {
    Running::capture(command)?.finish(PATIENCE)
}

fn output_and_error_output_arrive_apart(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let finished =
        finish(&mut sandbox.run(&["--rm"], "c", &["sh", "-c", "echo out; echo err >&2"]))?;
    ensure!(
        finished.code == Some(0) && finished.stdout == "out\n" && finished.stderr == "err\n",
        "{finished:?}"
    );
    Ok(())
}

fn large_output_right_before_the_exit_is_whole(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    // 3.2 MB: many times what a pipe holds.
    let finished = finish(&mut sandbox.run(&["--rm"], "c", &["guest", "flood", "50000"]))?;
    ensure!(finished.code == Some(0), "{:?}", finished.stderr);
    ensure!(
        finished.stdout.len() == 50_000 * 64,
        "{} bytes arrived",
        finished.stdout.len()
    );
    Ok(())
}

fn input_reaches_the_container_and_ends(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    // ctr 1.6 closes the input of its task only if its own ends after NewTask has returned;
    // runc-v2's container then waits without end. So the input comes when the container runs, and
    // ours alone is tested with the early one.
    let mut running =
        Running::capture(sandbox.run(&["--rm"], "c", &["cat"]).stdin(Stdio::piped()))?;
    sandbox.wait_for_status("c", "RUNNING")?;
    running.feed(b"hello\n")?;
    let finished = running.finish(PATIENCE)?;
    ensure!(
        finished.code == Some(0) && finished.stdout == "hello\n",
        "{finished:?}"
    );
    if stage.runtime() == testbed::sandbox::EMBEDSHIM {
        let mut running = Running::capture(
            sandbox
                .run(&["--rm"], "early", &["cat"])
                .stdin(Stdio::piped()),
        )?;
        running.feed(b"early\n")?;
        let finished = running.finish(PATIENCE)?;
        ensure!(
            finished.code == Some(0) && finished.stdout == "early\n",
            "{finished:?}"
        );
    }
    Ok(())
}

fn a_terminal_is_a_terminal(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let command = sandbox.run(&["--rm", "--tty"], "c", &["sh", "-c", "tty; exit 5"]);
    let finished = finish(&mut on_a_terminal(&command))?;
    ensure!(
        finished.code == Some(5) && finished.stdout.contains("/dev/pts/"),
        "{finished:?}"
    );
    Ok(())
}

fn large_terminal_output_is_not_truncated(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let command = sandbox.run(&["--rm", "--tty"], "c", &["guest", "flood", "20000"]);
    let finished = finish(&mut on_a_terminal(&command))?;
    // `script` sends a byte at the end of its own input, which the terminal echoes before the first
    // line.
    let whole = |line: &&str| line.trim().trim_start_matches("^@").len() == 63;
    let lines = finished.stdout.lines().filter(whole).count();
    ensure!(
        finished.code == Some(0) && lines == 20_000,
        "{lines} of 20000 lines, code {:?}",
        finished.code
    );
    Ok(())
}

/// A container to exec in.
fn with_container(stage: &Stage) -> anyhow::Result<Sandbox> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&[], "c", &["sleep", "1000"])?;
    Ok(sandbox)
}

fn exec(sandbox: &Sandbox, options: &[&str], id: &str, command: &[&str]) -> Command {
    let mut ctr = sandbox.ctr(["task", "exec", "--fifo-dir"]);
    ctr.arg(sandbox.directory().join("fifo"))
        .args(options)
        .args(["--exec-id", id, "c"])
        .args(command);
    ctr
}

fn an_exec_has_its_own_output_and_exit_code(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = with_container(stage)?;
    let finished = finish(&mut exec(
        &sandbox,
        &[],
        "e",
        &["sh", "-c", "echo in; exit 3"],
    ))?;
    ensure!(
        finished.code == Some(3) && finished.stdout == "in\n",
        "{finished:?}"
    );
    ensure!(
        sandbox.task("c")?.status == "RUNNING",
        "the container ended with its exec"
    );
    Ok(())
}

fn an_exec_reads_its_input(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = with_container(stage)?;
    let mut running = Running::capture(exec(&sandbox, &[], "e", &["cat"]).stdin(Stdio::piped()))?;
    running.feed(b"for the exec\n")?;
    let finished = running.finish(PATIENCE)?;
    ensure!(
        finished.code == Some(0) && finished.stdout == "for the exec\n",
        "{finished:?}"
    );
    Ok(())
}

fn an_exec_can_have_a_terminal(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = with_container(stage)?;
    let command = exec(&sandbox, &["--tty"], "e", &["sh", "-c", "tty; exit 6"]);
    let finished = finish(&mut on_a_terminal(&command))?;
    ensure!(
        finished.code == Some(6) && finished.stdout.contains("/dev/pts/"),
        "{finished:?}"
    );
    Ok(())
}

fn sixty_four_containers_at_once(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let id = |number: i32| format!("c{number}");
    let mut running = Vec::new();
    for number in 0..64 {
        let code = format!("echo {number}; exit {number}");
        running.push(Running::capture(&mut sandbox.run(
            &["--rm"],
            &id(number),
            &["sh", "-c", &code],
        ))?);
    }
    for (number, mut run) in (0..64).zip(running) {
        let finished = run.finish(3 * PATIENCE).with_context(|| id(number))?;
        let right = finished.code == Some(number) && finished.stdout == format!("{number}\n");
        ensure!(right, "{}: {finished:?}", id(number));
    }
    Ok(())
}

fn a_deleted_container_leaves_nothing(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    // The first one starts the daemon, whose own descriptors count as there before.
    finish(&mut sandbox.run(&["--rm"], "first", &["true"]))?;
    let before = Footprint::of(&sandbox);
    sandbox.detached(&[], "c", &["sleep", "1000"])?;
    finish(&mut exec(&sandbox, &[], "e", &["true"]))?;
    let finished = finish(&mut on_a_terminal(&exec(
        &sandbox,
        &["--tty"],
        "t",
        &["true"],
    )))?;
    ensure!(finished.code == Some(0), "{finished:?}");
    sandbox.ctr_ok(&["task", "rm", "--force", "c"])?;
    sandbox.ctr_ok(&["container", "rm", "c"])?;
    before.wait_for_return(&sandbox)
}

fn an_id_can_be_used_again(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    for code in [1, 2, 3] {
        let finished =
            finish(&mut sandbox.run(&["--rm"], "same", &["sh", "-c", &format!("exit {code}")]))?;
        ensure!(finished.code == Some(code), "{finished:?}");
    }
    Ok(())
}

//! Where output goes: loggers, files, and fifos whose readers come and go.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::ensure;
use embedshim_tests::{Bundle, Footprint, Shim, Stage, Test};
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use testbed::sandbox::{PATIENCE, Running, Sandbox, until};

use crate::tests;

pub(crate) const TESTS: [Test; 4] = tests!(AnyRuntime:
    a_logger_gets_both_outputs_and_only_its_environment,
    an_execs_logger_is_told_the_execs_id,
    a_log_file_is_made_with_its_directories,
    a_logger_that_is_not_there_is_named,
);
pub(crate) const OURS: [Test; 5] = tests!(EmbedshimOnly:
    a_reader_that_goes_and_comes_back_under_load_loses_nothing,
    a_fifo_that_nobody_reads_holds_up_only_the_container,
    a_logger_goes_on_while_the_daemon_is_replaced,
    a_terminals_output_goes_to_a_logger_too,
    a_logger_that_does_not_end_is_killed,
);

/// A logger that writes what it gets to `DIR/ID.{out,err,env}`, where DIR is its second argument.
fn logger(sandbox: &Sandbox, end: &str) -> anyhow::Result<PathBuf> {
    let path = sandbox.directory().join("logger");
    let script = format!(
        "#!/bin/sh\nexport PATH=/usr/bin:/bin\nlog=$2/$CONTAINER_ID\n/usr/bin/env -u PATH -u PWD -u _ -u SHLVL -u OLDPWD > $log.env\n\
         cat <&3 5>&- > $log.out &\ncat <&4 5>&- > $log.err &\nexec 3<&- 4<&- 5>&-\n{end}\n"
    );
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

fn uri(sandbox: &Sandbox, logger: &Path) -> String {
    format!(
        "binary://{}?dir={}",
        logger.display(),
        sandbox.directory().display()
    )
}

fn wait_for_text(path: &Path, text: &str) -> anyhow::Result<()> {
    until(&format!("{text:?} is in {}", path.display()), || {
        Ok(fs::read_to_string(path).is_ok_and(|found| found.contains(text)))
    })
}

fn a_logger_gets_both_outputs_and_only_its_environment(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let uri = uri(&sandbox, &logger(&sandbox, "wait")?);
    let pid = sandbox.detached(
        &["--log-uri", &uri],
        "c",
        &["sh", "-c", "echo out; echo err >&2; exit 3"],
    )?;
    sandbox.wait_for_status("c", "STOPPED")?;
    let log = |suffix: &str| sandbox.directory().join(format!("c.{suffix}"));
    wait_for_text(&log("out"), "out\n")?;
    wait_for_text(&log("err"), "err\n")?;
    let environment = fs::read_to_string(log("env"))?;
    let mut names: Vec<&str> = environment
        .lines()
        .filter_map(|line| line.split('=').next())
        .collect();
    names.sort_unstable();
    ensure!(
        names == ["CONTAINER_ID", "CONTAINER_NAMESPACE"],
        "{environment}"
    );
    ensure!(
        sandbox.delete_task("c")? == 3 && pid > 0,
        "the code was lost"
    );
    Ok(())
}

fn an_execs_logger_is_told_the_execs_id(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let uri = uri(&sandbox, &logger(&sandbox, "wait")?);
    sandbox.detached(&[], "c", &["sleep", "1000"])?;
    sandbox.ctr_ok(&[
        "task",
        "exec",
        "--detach",
        "--log-uri",
        &uri,
        "--exec-id",
        "e",
        "c",
        "echo",
        "from the exec",
    ])?;
    wait_for_text(&sandbox.directory().join("e.out"), "from the exec\n")
}

fn a_log_file_is_made_with_its_directories(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let path = sandbox.directory().join("some/where/log");
    let uri = format!("file://{}", path.display());
    sandbox.detached(
        &["--log-uri", &uri],
        "c",
        &["sh", "-c", "echo out; echo err >&2"],
    )?;
    sandbox.wait_for_status("c", "STOPPED")?;
    // runc-v2 copies the two apart from each other: whichever comes first.
    wait_for_text(&path, "out\n")?;
    wait_for_text(&path, "err\n")
}

fn a_logger_that_is_not_there_is_named(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    Running::capture(&mut sandbox.run(&["--rm"], "first", &["true"]))?.finish(PATIENCE)?;
    let before = Footprint::of(&sandbox);
    let error = sandbox
        .detached(
            &["--log-uri", "binary:///nonexistent/logger"],
            "c",
            &["true"],
        )
        .unwrap_err()
        .to_string();
    ensure!(error.contains("/nonexistent/logger"), "{error}");
    let _ = sandbox.ctr_ok(&["container", "rm", "c"]);
    before.wait_for_return(&sandbox)
}

fn a_logger_goes_on_while_the_daemon_is_replaced(stage: &Stage) -> anyhow::Result<()> {
    let mut sandbox = stage.sandbox()?;
    let uri = uri(&sandbox, &logger(&sandbox, "wait")?);
    let script = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done";
    sandbox.detached(&["--log-uri", &uri], "c", &["sh", "-c", script])?;
    let log = sandbox.directory().join("c.out");
    wait_for_text(&log, "\n1\n")?;
    sandbox.stop_containerd()?;
    sandbox.end_daemon(Signal::SIGKILL)?;
    let lines = fs::read_to_string(&log)?.lines().count();
    until("it logs on", || {
        Ok(fs::read_to_string(&log)?.lines().count() > lines + 3)
    })?;
    sandbox.start_daemon()?;
    sandbox.start_containerd()?;
    sandbox.ctr_ok(&["task", "kill", "--signal", "KILL", "c"])?;
    sandbox.wait_for_status("c", "STOPPED")?;
    ensure!(sandbox.delete_task("c")? == 137, "the code was lost");
    let text = fs::read_to_string(&log)?;
    let in_order = text
        .lines()
        .enumerate()
        .all(|(number, line)| line == number.to_string());
    ensure!(in_order, "lines are missing: {text}");
    Ok(())
}

fn a_terminals_output_goes_to_a_logger_too(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let uri = uri(&sandbox, &logger(&sandbox, "wait")?);
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", "echo on a terminal; exit 2"])?;
    bundle.edit(|spec| {
        if let Some(terminal) = spec.pointer_mut("/process/terminal") {
            *terminal = true.into();
        }
    })?;
    let shim = Shim::connect(&sandbox)?;
    let before = Footprint::of(&sandbox);
    shim.create_with("c", bundle.path(), |request| {
        request.stdout = uri;
        request.terminal = true;
    })?;
    shim.start("c")?;
    ensure!(shim.wait("c")? == 2 && shim.delete("c")? == 2, "not 2");
    wait_for_text(&sandbox.directory().join("c.out"), "on a terminal\r\n")?;
    before.wait_for_return(&sandbox)
}

fn a_logger_that_does_not_end_is_killed(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let uri = uri(
        &sandbox,
        &logger(
            &sandbox,
            "trap '' TERM; echo $$ > $log.pid; while :; do sleep 1; done",
        )?,
    );
    sandbox.detached(&["--log-uri", &uri], "c", &["true"])?;
    sandbox.wait_for_status("c", "STOPPED")?;
    let file = sandbox.directory().join("c.pid");
    wait_for_text(&file, "\n")?;
    let pid: i32 = fs::read_to_string(&file)?.trim().parse()?;
    sandbox.delete_task("c")?;
    until("it is killed", || Ok(!testbed::sandbox::is_alive(pid)))
}

/// 300 kB, four times what a pipe holds, read by many that come and go: as containerd does when it
/// is restarted.
fn a_reader_that_goes_and_comes_back_under_load_loses_nothing(stage: &Stage) -> anyhow::Result<()> {
    const LINES: usize = 60_000;
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let script = format!("seq {LINES}; exit 4");
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", &script])?;
    let fifo = sandbox.directory().join("stdout");
    mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR)?;
    let shim = Shim::connect(&sandbox)?;
    let before = Footprint::of(&sandbox);
    shim.create_with("c", bundle.path(), |request| {
        request.stdout = fifo.to_string_lossy().into_owned();
    })?;
    shim.start("c")?;
    let mut text = Vec::new();
    let mut readers = 0;
    let expected: usize = (1..=LINES).map(|number| number.to_string().len() + 1).sum();
    until("everything is read", || {
        let mut reader = File::options()
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(&fifo)?;
        let mut piece = vec![0; 16 << 10];
        match reader.read(&mut piece) {
            Ok(length) => text.extend_from_slice(&piece[..length]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        readers += 1;
        Ok(text.len() >= expected)
    })?;
    ensure!(readers > 10, "only {readers} readers");
    ensure!(
        shim.wait("c")? == 4 && shim.delete("c")? == 4,
        "the code was lost"
    );
    let text = String::from_utf8(text)?;
    let in_order = text
        .lines()
        .eq((1..=LINES).map(|number| number.to_string()));
    ensure!(in_order, "lines are missing");
    before.wait_for_return(&sandbox)
}

/// Opening waits for no reader (containerd's issue 4068); who writes more than a pipe holds waits,
/// and can be killed.
fn a_fifo_that_nobody_reads_holds_up_only_the_container(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let fifo = sandbox.directory().join("stdout");
    mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR)?;
    let shim = Shim::connect(&sandbox)?;
    let before = Footprint::of(&sandbox);
    let mut codes = Vec::new();
    for (id, script) in [
        ("little", "echo little; exit 3"),
        ("much", "seq 60000; exit 4"),
    ] {
        let bundle = Bundle::new(&sandbox, id, &["sh", "-c", script])?;
        shim.create_with(id, bundle.path(), |request| {
            request.stdout = fifo.to_string_lossy().into_owned();
        })?;
        shim.start(id)?;
        if id == "much" {
            shim.kill(id, Signal::SIGKILL)?;
        }
        codes.push(shim.wait(id)?);
        shim.delete(id)?;
    }
    ensure!(codes == [3, 137], "{codes:?}");
    before.wait_for_return(&sandbox)
}

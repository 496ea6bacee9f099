//! Terminals, as their clients see them: every line once and in order, to the end, whatever becomes
//! of the daemon, of the client's files, or of the terminal's openers.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::ensure;
use embedshim_tests::{
    Bundle, Footprint, Reader, Shim, Stage, Test, ensure_counted, on_a_terminal,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::sandbox::{PATIENCE, Running, Sandbox, until};

use crate::tests;

pub(crate) const TESTS: [Test; 1] = tests!(AnyRuntime:
    a_terminal_that_is_closed_and_opened_again_is_heard,
);
pub(crate) const OURS: [Test; 7] = tests!(EmbedshimOnly:
    a_terminals_client_reads_every_line_though_the_daemon_is_killed,
    a_terminals_client_reads_every_line_though_the_daemon_is_stopped,
    a_terminals_client_reads_every_line_over_an_upgrade,
    an_execs_terminal_goes_on_under_the_next_daemons,
    a_terminal_outlives_the_path_of_its_clients_fifo,
    a_terminal_into_a_log_file_loses_nothing_with_a_daemon,
    sockets_of_terminals_that_never_come_are_removed,
);

/// Counts for three seconds.
const COUNTING: &str =
    "i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo line $i; sleep 0.05; done; exit 7";

/// `ctr run -t` and `ctr task exec -t`, each on a terminal of its own, while `replace` is done to
/// the daemon twice.
fn through_ctr(
    stage: &Stage,
    replace: impl Fn(&Sandbox) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&["--null-io"], "other", &["sleep", "1000"])?;
    let run = sandbox.run(&["--tty", "--rm"], "c", &["sh", "-c", COUNTING]);
    let exec = sandbox.ctr([
        "task",
        "exec",
        "--tty",
        "--exec-id",
        "e",
        "other",
        "sh",
        "-c",
        COUNTING,
    ]);
    let mut clients = [run, exec]
        .iter()
        .map(|command| Running::capture(&mut on_a_terminal(command)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(800));
        replace(&sandbox)?;
    }
    for client in &mut clients {
        let finished = client.finish(PATIENCE)?;
        ensure_counted(&finished.stdout, "line", 60)?;
        ensure!(finished.code == Some(7), "{finished:?}");
    }
    Ok(())
}

fn a_terminals_client_reads_every_line_though_the_daemon_is_killed(
    stage: &Stage,
) -> anyhow::Result<()> {
    through_ctr(stage, |sandbox| sandbox.kill_daemon().map(drop))
}

fn a_terminals_client_reads_every_line_though_the_daemon_is_stopped(
    stage: &Stage,
) -> anyhow::Result<()> {
    through_ctr(stage, |sandbox| {
        sandbox.replace_daemon(Signal::SIGTERM).map(drop)
    })
}

fn a_terminals_client_reads_every_line_over_an_upgrade(stage: &Stage) -> anyhow::Result<()> {
    through_ctr(stage, |sandbox| upgrade(stage, sandbox))
}

/// `embedshimd upgrade`, to the same binary.
pub(crate) fn upgrade(stage: &Stage, sandbox: &Sandbox) -> anyhow::Result<()> {
    let mut upgrade = Command::new(stage.binary("embedshimd"));
    upgrade
        .args(["upgrade", "--state-dir"])
        .arg(sandbox.state_dir());
    let upgraded = Running::capture(&mut upgrade)?.finish(PATIENCE * 2)?;
    ensure!(upgraded.code == Some(0), "{upgraded:?}");
    Ok(())
}

fn start(stage: &Stage) -> anyhow::Result<(Sandbox, Shim)> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    Ok((sandbox, shim))
}

fn on_terminal(sandbox: &Sandbox, id: &str, script: &str) -> anyhow::Result<Bundle> {
    let bundle = Bundle::new(sandbox, id, &["sh", "-c", script])?;
    bundle.edit(|spec| spec["process"]["terminal"] = true.into())?;
    Ok(bundle)
}

fn an_execs_terminal_goes_on_under_the_next_daemons(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = start(stage)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let before = Footprint::of(&sandbox);
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    let mut reader = Reader::new(&sandbox, "out")?;
    shim.exec_with("c", "e", &["sh", "-c", COUNTING], |request| {
        request.terminal = true;
        request.stdout = reader.path();
    })?;
    shim.start_exec("c", "e")?;
    for line in [5, 15, 25, 35, 45] {
        reader.wait_for(&format!("line {line}\r\n"))?;
        sandbox.kill_daemon()?;
    }
    ensure!(shim.wait_exec("c", "e")? == 7, "not 7");
    // Its end comes by itself.
    ensure_counted(&reader.finish()?, "line", 60)?;
    shim.delete_exec("c", "e")?;
    shim.kill("c", Signal::SIGKILL)?;
    shim.wait("c")?;
    shim.delete("c")?;
    before.wait_for_return(&sandbox)
}

/// As an init system does with its console.
fn a_terminal_that_is_closed_and_opened_again_is_heard(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let script = "echo first; exec 0<&- 1>&- 2>&-; sleep 1; echo second >/dev/console; exec 1>/dev/console; echo third; exit 6";
    let command = sandbox.run(&["--tty", "--rm"], "c", &["sh", "-c", script]);
    let finished = Running::capture(&mut on_a_terminal(&command))?.finish(PATIENCE)?;
    let said: Vec<&str> = finished.stdout.split_whitespace().collect();
    ensure!(
        said == ["first", "second", "third"] && finished.code == Some(6),
        "{finished:?}"
    );
    Ok(())
}

fn a_terminal_outlives_the_path_of_its_clients_fifo(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = start(stage)?;
    let bundle = on_terminal(&sandbox, "c", COUNTING)?;
    let mut reader = Reader::new(&sandbox, "out")?;
    shim.create_with("c", bundle.path(), |request| {
        request.terminal = true;
        request.stdout = reader.path();
    })?;
    shim.start("c")?;
    reader.wait_for("line 5\r\n")?;
    fs::remove_file(reader.path())?;
    sandbox.kill_daemon()?;
    ensure!(shim.wait("c")? == 7, "not 7");
    ensure_counted(&reader.finish()?, "line", 60)?;
    shim.delete("c")?;
    Ok(())
}

/// A file takes no splice: what was taken from the terminal waits in a pipe that outlives the
/// daemon.
fn a_terminal_into_a_log_file_loses_nothing_with_a_daemon(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = start(stage)?;
    let script = "i=0; while [ $i -lt 40000 ]; do i=$((i+1)); echo line $i; done; exit 7";
    let bundle = on_terminal(&sandbox, "c", script)?;
    let before = Footprint::of(&sandbox);
    let log = sandbox.directory().join("logs/c");
    shim.create_with("c", bundle.path(), |request| {
        request.terminal = true;
        request.stdout = format!("file://{}", log.display());
    })?;
    shim.start("c")?;
    let mut kills = 0;
    while shim.state("c")?.exited_at.seconds < 0 {
        sandbox.kill_daemon()?;
        kills += 1;
    }
    ensure!(shim.wait("c")? == 7 && kills > 0, "not 7");
    shim.delete("c")?;
    ensure_repeats_at_most(&fs::read_to_string(&log)?, 40_000, kills)?;
    before.wait_for_return(&sandbox)
}

/// Every line is there, in order, but for one chunk that each kill may repeat.
pub(crate) fn ensure_repeats_at_most(text: &str, last: usize, kills: usize) -> anyhow::Result<()> {
    let mut next = 1;
    let mut jumps = 0;
    // A repeated chunk begins within a line.
    for line in text.split(['\n', '\r']).filter(|line| !line.is_empty()) {
        let number = line
            .strip_prefix("line ")
            .and_then(|number| number.parse::<usize>().ok());
        match number {
            Some(number) if number == next => next += 1,
            Some(number) if number < next => {}
            _ => jumps += 1,
        }
    }
    ensure!(
        next == last + 1,
        "line {next} of {last} is missing, with {kills} kills"
    );
    ensure!(jumps <= kills, "{jumps} torn lines with {kills} kills");
    Ok(())
}

/// A creation that is cut short in its call of the runtime, and whose request does not come again.
fn sockets_of_terminals_that_never_come_are_removed(stage: &Stage) -> anyhow::Result<()> {
    let (sandbox, shim) = start(stage)?;
    let bundle = on_terminal(&sandbox, "c", "sleep 1000")?;
    let sockets = sandbox.state_dir().join("tty");
    let runtime = sandbox.directory().join("hanging-runc");
    let script = "#!/bin/sh\nfor word in \"$@\"; do [ \"$word\" = create ] && exec sleep 1000; done\nexec runc \"$@\"\n";
    embedshim_tests::write_program(&runtime, script)?;
    let reader = Reader::new(&sandbox, "out")?;
    std::thread::scope(|scope| {
        let request = scope.spawn(|| {
            shim.create_with("c", bundle.path(), |request| {
                request.terminal = true;
                request.stdout = reader.path();
                request.options = embedshim_tests::binary_name(&runtime);
            })
        });
        until("its socket is there", || Ok(entries(&sockets) == 1))?;
        // The call ends with the daemon, and so does the connection: nothing comes again.
        sandbox.end_daemon(Signal::SIGKILL)?;
        end_program("sleep\x001000\0", &sandbox)?;
        ensure!(
            request.join().is_ok_and(|answer| answer.is_err()),
            "created"
        );
        Ok(())
    })?;
    sandbox.start_daemon()?;
    until("its socket is gone", || Ok(entries(&sockets) == 0))
}

fn entries(directory: &Path) -> usize {
    fs::read_dir(directory).map_or(0, Iterator::count)
}

/// Kills the process of this command line that has the sandbox in its environment.
fn end_program(command: &str, sandbox: &Sandbox) -> anyhow::Result<()> {
    let needle = sandbox.directory().to_string_lossy().into_owned();
    for entry in fs::read_dir("/proc")?.flatten() {
        let read = |file: &str| {
            let bytes = fs::read(entry.path().join(file)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        if read("cmdline") == command && read("environ").contains(&needle) {
            let pid = entry.file_name().to_string_lossy().parse()?;
            kill(Pid::from_raw(pid), Signal::SIGKILL)?;
        }
    }
    Ok(())
}

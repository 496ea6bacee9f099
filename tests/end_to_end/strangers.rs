//! Processes that say something about themselves which is not so: no daemon is held up by them, or
//! uses what they say.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Shim, Stage, Test};
use nix::sys::signal::Signal;
use testbed::sandbox::{Running, until};

use crate::tests;

pub(crate) const TESTS: [Test; 2] = tests!(EmbedshimOnly:
    a_gigabyte_of_arguments_costs_the_next_daemon_nothing,
    a_stranger_that_names_a_bundle_is_no_call_of_the_runtime,
);

/// What the daemon has used at most, in kB.
fn peak_memory(pid: i32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.context("no VmHWM")?.parse()?)
}

/// Of an ordinary container's process: it takes no capability.
fn a_gigabyte_of_arguments_costs_the_next_daemon_nothing(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let arguments = ["guest", "long-arguments", "1024"];
    let pid = sandbox.detached(&["--null-io"], "c", &arguments)?;
    until("it has declared its arguments", || {
        // Not its command line: that is what must not be read.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let fields: Vec<&str> = stat
            .rsplit(") ")
            .next()
            .unwrap_or_default()
            .split(' ')
            .collect();
        let field = |index: usize| {
            fields
                .get(index)
                .and_then(|field| field.parse::<u64>().ok())
        };
        // Fields 48 and 49 of proc_pid_stat(5); the third is the first here.
        Ok(field(46)
            .unwrap_or(0)
            .saturating_sub(field(45).unwrap_or(0))
            == 1 << 30)
    })?;
    sandbox.kill_daemon()?;
    let daemon = sandbox.daemon_pid().context("no daemon")?;
    let peak = peak_memory(daemon)?;
    ensure!(peak < 100_000, "the daemon has used {peak} kB");
    sandbox.ctr_ok(&["task", "kill", "--signal", "SIGKILL", "c"])?;
    Ok(())
}

/// A process of `nobody`, with the words of a call in its command line.
fn a_stranger_that_names_a_bundle_is_no_call_of_the_runtime(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    let mut stranger = Command::new("sh");
    stranger
        .args(["-c", "read end", "--log"])
        .arg(bundle.path().join("log.json"))
        .uid(65534)
        .stdin(Stdio::piped());
    let mut stranger = Running::spawn(&mut stranger)?;
    sandbox.kill_daemon()?;
    let asked = Instant::now();
    shim.exec_with("c", "e", &["sh", "-c", "exit 5"], |_| {})?;
    shim.start_exec("c", "e")?;
    ensure!(shim.wait_exec("c", "e")? == 5, "not 5");
    shim.kill("c", Signal::SIGKILL)?;
    shim.wait("c")?;
    ensure!(shim.delete("c")? == 137, "not 137");
    let took = asked.elapsed();
    ensure!(took < Duration::from_secs(30), "it took {took:?}");
    ensure!(!stranger.has_ended()?, "the stranger was killed");
    Ok(())
}

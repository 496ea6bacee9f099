//! The daemon is replaced under a living containerd: killed, asked to leave, upgraded. Neither
//! containerd nor a container notices.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Footprint, Shim, Stage, Test};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::sandbox::{Finished, PATIENCE, Running, Sandbox, is_alive, stop, until};

use crate::exits::{REBOOTS, reboots_when_told};
use crate::survival::handles_term;
use crate::tests;

pub(crate) const TESTS: [Test; 11] = tests!(EmbedshimOnly:
    a_client_gets_its_exit_code_though_the_daemon_was_killed,
    an_init_that_reboots_ends_as_ever_though_the_daemon_was_killed,
    ten_kills_in_a_row_lose_nothing,
    a_hangup_replaces_the_daemon,
    an_upgrade_takes_the_binary_on_disk_and_loses_nothing,
    an_upgrade_to_a_program_of_the_first_handover_loses_no_descriptor,
    an_upgrade_without_a_keeper_is_refused,
    garbage_does_not_disturb_the_keeper,
    a_stopped_keeper_holds_up_nobody,
    what_a_stopped_keeper_has_not_read_outlives_the_daemon,
    a_status_waits_for_the_next_daemon_without_bpf_too,
);

/// The container runs and can be worked with.
fn unharmed(sandbox: &Sandbox, id: &str, pid: i32) -> anyhow::Result<()> {
    let task = sandbox.task(id)?;
    ensure!(
        (task.pid, task.status.as_str()) == (pid, "RUNNING"),
        "{task:?}: {}",
        sandbox.daemon_log()
    );
    sandbox
        .ctr_ok(&["task", "exec", "--exec-id", "e", id, "true"])
        .map(drop)
}

fn a_client_gets_its_exit_code_though_the_daemon_was_killed(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let mut client =
        Running::capture(&mut sandbox.run(&["--rm"], "c", &["guest", "until-term", "7"]))?;
    sandbox.wait_for_status("c", "RUNNING")?;
    let pid = sandbox.task("c")?.pid;
    handles_term(pid)?;
    sandbox.kill_daemon()?;
    unharmed(&sandbox, "c", pid)?;
    sandbox.ctr_ok(&["task", "kill", "--signal", "TERM", "c"])?;
    let finished = client.finish(PATIENCE)?;
    ensure!(
        finished.code == Some(7),
        "{finished:?}: {}",
        sandbox.daemon_log()
    );
    Ok(())
}

/// Without the parent's word it is the kernel's record that counts.
fn an_init_that_reboots_ends_as_ever_though_the_daemon_was_killed(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let mut pids = Vec::new();
    for (command, _) in REBOOTS {
        pids.push(reboots_when_told(&sandbox, command)?);
    }
    sandbox.kill_daemon()?;
    for ((command, code), pid) in REBOOTS.into_iter().zip(pids) {
        unharmed(&sandbox, command, pid)?;
        sandbox.ctr_ok(&["task", "kill", "--signal", "TERM", command])?;
        sandbox.wait_for_status(command, "STOPPED")?;
        let told = sandbox.delete_task(command)?;
        ensure!(
            told == code,
            "{command}: {told} instead of {code}: {}",
            sandbox.daemon_log()
        );
    }
    Ok(())
}

fn ten_kills_in_a_row_lose_nothing(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&[], "first", &["true"])?;
    sandbox.wait_for_status("first", "STOPPED")?;
    sandbox.delete_task("first")?;
    let before = Footprint::of(&sandbox);
    let pid = sandbox.detached(&[], "c", &["sleep", "1000"])?;
    for _ in 0..10 {
        sandbox.kill_daemon()?;
    }
    unharmed(&sandbox, "c", pid)?;
    sandbox.ctr_ok(&["task", "kill", "--signal", "KILL", "c"])?;
    sandbox.wait_for_status("c", "STOPPED")?;
    ensure!(sandbox.delete_task("c")? == 137, "the code was lost");
    // The keeper has become its parent, and does not keep the zombie.
    before.wait_for_return(&sandbox)
}

fn a_hangup_replaces_the_daemon(stage: &Stage) -> anyhow::Result<()> {
    let mut sandbox = stage.sandbox()?;
    let pid = sandbox.detached(&[], "c", &["sleep", "1000"])?;
    let keeper = sandbox.keeper_pid().context("no keeper")?;
    sandbox.replace_daemon(Signal::SIGHUP)?;
    unharmed(&sandbox, "c", pid)?;
    let old = sandbox.daemon_pid().context("no daemon")?;
    kill(Pid::from_raw(keeper), Signal::SIGHUP)?;
    sandbox.successor_of(old)?;
    unharmed(&sandbox, "c", pid)?;
    ensure!(
        sandbox.keeper_pid() == Some(keeper),
        "the keeper went with it"
    );
    // And SIGTERM ends both. A containerd that lives would start them again for the cleanup.
    sandbox.stop_containerd()?;
    kill(Pid::from_raw(keeper), Signal::SIGTERM)?;
    until("both end", || {
        Ok(sandbox.keeper_pid().is_none() && sandbox.daemon_pid().is_none())
    })?;
    ensure!(is_alive(pid), "the container went with them");
    Ok(())
}

fn upgrade(program: &Path, sandbox: &Sandbox) -> anyhow::Result<Finished> {
    let mut command = Command::new(program);
    command
        .args(["upgrade", "--state-dir"])
        .arg(sandbox.state_dir());
    Running::capture(&mut command)?.finish(PATIENCE * 2)
}

/// Puts a file in the place of another at once, as a package manager does.
fn replace(path: &Path, content: &[u8]) -> anyhow::Result<u64> {
    let new = path.with_extension("new");
    fs::write(&new, content)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
    fs::rename(&new, path)?;
    Ok(path.metadata()?.ino())
}

fn an_upgrade_takes_the_binary_on_disk_and_loses_nothing(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    let original = stage.binary("embedshimd");
    let content = fs::read(&original)?;
    let program = sandbox.directory().join("embedshimd");
    replace(&program, &content)?;
    sandbox.start_daemon_of(&program)?;
    let script = "trap 'exit 7' TERM; while :; do sleep 0.05; done";
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", script])?;
    let shim = Shim::connect(&sandbox)?;
    let pid = i32::try_from(shim.create("c", bundle.path())?)?;
    shim.start("c")?;
    let (keeper, daemon) = (sandbox.keeper_pid(), sandbox.daemon_pid());
    // What cannot be executed, what cannot be loaded, and what is another program.
    for broken in [&b"nonsense"[..], b"#!/nonexistent\n", b"#!/bin/false\n"] {
        replace(&program, broken)?;
        let refused = upgrade(&original, &sandbox)?;
        ensure!(
            refused.code == Some(1) && refused.stderr.contains("the keeper goes on as it was"),
            "{refused:?}"
        );
    }
    ensure!(
        (sandbox.keeper_pid(), sandbox.daemon_pid()) == (keeper, daemon),
        "a refused upgrade has done something"
    );
    let inode = replace(&program, &content)?;
    for _ in 0..2 {
        let daemon = sandbox.daemon_pid();
        let upgraded = upgrade(&original, &sandbox)?;
        ensure!(
            upgraded.code == Some(0) && upgraded.stdout.contains("is replaced by"),
            "{upgraded:?}: {}",
            sandbox.daemon_log()
        );
        ensure!(sandbox.keeper_pid() == keeper, "not the same process");
        ensure!(sandbox.daemon_pid() != daemon, "the same daemon");
    }
    for pid in [sandbox.keeper_pid(), sandbox.daemon_pid()] {
        let running = fs::metadata(format!("/proc/{}/exe", pid.context("gone")?))?;
        ensure!(running.ino() == inode, "it runs the old file");
    }
    // On the same connection.
    ensure!(i32::try_from(shim.state("c")?.pid)? == pid, "another task");
    handles_term(pid)?;
    kill(Pid::from_raw(pid), Signal::SIGTERM)?;
    ensure!(
        shim.wait("c")? == 7 && shim.delete("c")? == 7,
        "the code was lost"
    );
    Ok(())
}

/// A version before statuses were handed over, as a downgrade meets it.
fn an_upgrade_to_a_program_of_the_first_handover_loses_no_descriptor(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    let original = stage.binary("embedshimd");
    let program = sandbox.directory().join("embedshimd");
    replace(&program, &fs::read(&original)?)?;
    sandbox.start_daemon_of(&program)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let shim = Shim::connect(&sandbox)?;
    let pid = shim.create("c", bundle.path())?;
    let asked = sandbox.directory().join("asked");
    let script = format!(
        "#!/bin/sh\nif [ \"$2\" = --understands ]; then echo $3 >>{}; [ $3 = 1 ]; exit; fi\nexec {} \"$@\"\n",
        asked.display(),
        original.display()
    );
    replace(&program, script.as_bytes())?;
    let upgraded = upgrade(&original, &sandbox)?;
    ensure!(
        upgraded.code == Some(0),
        "{upgraded:?}: {}",
        sandbox.daemon_log()
    );
    let asked = fs::read_to_string(&asked)?;
    ensure!(asked == "2\n1\n", "{asked}");
    // On the same connection.
    ensure!(shim.start("c")? == pid, "another task");
    shim.kill("c", Signal::SIGKILL)?;
    ensure!(shim.wait("c")? == 137 && shim.delete("c")? == 137, "no 137");
    Ok(())
}

fn an_upgrade_without_a_keeper_is_refused(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    let program = stage.binary("embedshimd");
    let nothing = upgrade(&program, &sandbox)?;
    ensure!(
        nothing.code == Some(1) && nothing.stderr.contains("nothing runs on"),
        "{nothing:?}"
    );
    let mut serve = Command::new(&program);
    serve
        .args(["serve", "--state-dir"])
        .arg(sandbox.state_dir());
    let _daemon = Running::capture(&mut serve)?;
    until("the daemon serves", || Ok(Shim::connect(&sandbox).is_ok()))?;
    let refused = upgrade(&program, &sandbox)?;
    ensure!(
        refused.code == Some(1) && refused.stderr.contains("stop containerd, stop the daemon"),
        "{refused:?}"
    );
    ensure!(sandbox.daemon_pid().is_some(), "the daemon was ended");
    Ok(())
}

fn garbage_does_not_disturb_the_keeper(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let keeper = sandbox.keeper_pid();
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let shim = Shim::connect(&sandbox)?;
    shim.create("c", bundle.path())?;
    let path = sandbox.state_dir().join("keeper.sock");
    ensure!(
        path.metadata()?.permissions().mode() & 0o777 == 0o600,
        "others can write"
    );
    let socket = UnixDatagram::unbound()?;
    socket.connect(&path)?;
    let long = vec![b'A'; 100_000];
    // Of our own user, but not the daemon's.
    for message in [
        &b""[..],
        b"\xff\xfe\0",
        b"nonsense",
        b"FDSTOREREMOVE=1\nFDNAME=listener\n",
        b"FDSTORE=1\nFDNAME=conn/1\n",
        b"STOPPING=1",
        b"READY=1",
        &long,
    ] {
        for _ in 0..20 {
            socket.send(message)?;
        }
    }
    until("they are ignored", || {
        Ok(sandbox.daemon_log().contains("which is not the daemon"))
    })?;
    sandbox.kill_daemon()?;
    ensure!(
        sandbox.keeper_pid() == keeper,
        "the keeper is another: {}",
        sandbox.daemon_log()
    );
    // What it kept is there: the listener and the connection.
    shim.start("c")?;
    Shim::connect(&sandbox)?.state("c")?;
    Ok(())
}

fn a_stopped_keeper_holds_up_nobody(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", "exit 4"])?;
    let keeper = Pid::from_raw(sandbox.keeper_pid().context("no keeper")?);
    let stopped = Instant::now();
    stop(keeper)?;
    // More than its queue holds.
    let connections = (0..600)
        .map(|_| UnixStream::connect(sandbox.state_dir().join("shim.sock")))
        .collect::<Result<Vec<_>, _>>()?;
    let shim = Shim::connect(&sandbox)?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    ensure!(shim.wait("c")? == 4 && shim.delete("c")? == 4, "not 4");
    // One second for all, not for each.
    ensure!(stopped.elapsed() < PATIENCE, "{:?}", stopped.elapsed());
    kill(keeper, Signal::SIGCONT)?;
    drop(connections);
    let log = sandbox.daemon_log();
    ensure!(log.contains("is it stopped?"), "{log}");
    sandbox.kill_daemon()?;
    Shim::connect(&sandbox)?.state("c").map(drop).unwrap_err();
    Ok(())
}

/// More of it than the queue of a socket takes by the kernel's default.
fn what_a_stopped_keeper_has_not_read_outlives_the_daemon(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let daemon = sandbox.daemon_pid().context("no daemon")?;
    let keeper = Pid::from_raw(sandbox.keeper_pid().context("no keeper")?);
    stop(keeper)?;
    let mut lives = Vec::new();
    for number in 0..20 {
        let id = format!("c{number}");
        let script = "trap 'exit 9' TERM; while :; do sleep 0.1; done";
        let bundle = Bundle::new(&sandbox, &id, &["sh", "-c", script])?;
        let shim = Shim::connect(&sandbox)?;
        let pid = shim.create(&id, bundle.path())?;
        shim.start(&id)?;
        lives.push((id, bundle, shim, i32::try_from(pid)?));
    }
    let log = sandbox.daemon_log();
    ensure!(!log.contains("is it stopped?"), "{log}");
    kill(Pid::from_raw(daemon), Signal::SIGKILL)?;
    kill(keeper, Signal::SIGCONT)?;
    sandbox.successor_of(daemon)?;
    for (id, _, shim, pid) in &lives {
        handles_term(*pid)?;
        shim.kill(id, Signal::SIGTERM)?;
        ensure!(shim.wait(id)? == 9 && shim.delete(id)? == 9, "not 9");
    }
    Ok(())
}

fn a_status_waits_for_the_next_daemon_without_bpf_too(stage: &Stage) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("config.toml");
    let good = "[monitor]\nbackend = \"pidfd\"\n";
    fs::write(&config, good)?;
    let sandbox = stage.sandbox_with(&[("EMBEDSHIM_CONFIG", &config.to_string_lossy())])?;
    let pid = sandbox.detached(&[], "c", &["guest", "until-term", "9"])?;
    handles_term(pid)?;
    let (keeper, daemon) = (sandbox.keeper_pid(), sandbox.daemon_pid());
    let (keeper, daemon) = (keeper.context("no keeper")?, daemon.context("no daemon")?);
    // No daemon can start for a while; the keeper does not give up.
    fs::write(&config, "nonsense")?;
    kill(Pid::from_raw(daemon), Signal::SIGKILL)?;
    until("another has failed", || {
        Ok(sandbox.daemon_log().contains("embedshimd has failed"))
    })?;
    kill(Pid::from_raw(pid), Signal::SIGTERM)?;
    until("it ends", || Ok(!is_alive(pid)))?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    ensure!(stat.contains(" Z "), "nothing reads its status: {stat}");
    fs::write(&config, good)?;
    kill(Pid::from_raw(keeper), Signal::SIGHUP)?;
    sandbox.wait_for_status("c", "STOPPED")?;
    let code = sandbox.delete_task("c")?;
    ensure!(code == 9, "{code}: {}", sandbox.daemon_log());
    until("its zombie is reaped", || {
        Ok(!Path::new(&format!("/proc/{pid}")).exists())
    })
}

//! What the daemon stands on, taken away: room, the right to write, the keeper's descriptors, the
//! state directory itself, the boot. What cannot be done is said; what runs, runs on and is found
//! again.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Footprint, Shim, Stage, Test};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use serde_json::Value;
use testbed::sandbox::{Sandbox, is_alive, stop, until};

use crate::tests;

pub(crate) const TESTS: [Test; 6] = tests!(WithoutContainerd:
    a_full_state_directory_refuses_new_tasks_and_keeps_the_old,
    records_that_cannot_be_written_are_named_and_the_old_are_kept,
    what_could_not_be_kept_is_refused_by_name_and_what_runs_is_not_lost,
    what_an_earlier_boot_has_left_is_recognised,
    a_removed_state_directory_is_put_back,
    a_damaged_journal_costs_a_request_its_answer_at_most,
);

/// A sandbox whose state directory is a file system of its own.
fn on_own_tmpfs(stage: &Stage) -> anyhow::Result<Sandbox> {
    let sandbox = stage.bare_sandbox()?;
    let state_dir = sandbox.state_dir();
    fs::create_dir(&state_dir)?;
    let flags = MsFlags::empty();
    mount(
        Some("tmpfs"),
        &state_dir,
        Some("tmpfs"),
        flags,
        Some("size=1m"),
    )?;
    sandbox.start_daemon()?;
    Ok(sandbox)
}

/// Takes all the room that is left.
fn fill(directory: &Path) -> anyhow::Result<()> {
    let mut file = File::create(directory.join("ballast"))?;
    while file.write_all(&[0; 4096]).is_ok() {}
    Ok(())
}

fn a_full_state_directory_refuses_new_tasks_and_keeps_the_old(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = on_own_tmpfs(stage)?;
    let shim = Shim::connect(&sandbox)?;
    let old = Bundle::new(&sandbox, "old", &["sh", "-c", "sleep 1000 & wait"])?;
    let new = Bundle::new(&sandbox, "new", &["true"])?;
    let before = Footprint::of(&sandbox);
    shim.create("old", old.path())?;
    shim.start("old")?;
    fill(&sandbox.state_dir())?;
    let full = Footprint::of(&sandbox);
    let refusal = shim.create("new", new.path()).map_or_else(
        |error| error.to_string(),
        |pid| format!("created with pid {pid}"),
    );
    ensure!(
        refusal.contains("cannot write the task record"),
        "{refusal}"
    );
    full.wait_for_return(&sandbox)?;
    // Also for a daemon that finds it like that.
    sandbox.kill_daemon()?;
    shim.kill("old", Signal::SIGKILL)?;
    ensure!(shim.wait("old")? == 137, "not 137");
    fs::remove_file(sandbox.state_dir().join("ballast"))?;
    ensure!(shim.delete("old")? == 137, "not 137");
    shim.create("new", new.path())?;
    shim.start("new")?;
    ensure!(shim.wait("new")? == 0 && shim.delete("new")? == 0, "not 0");
    before.wait_for_return(&sandbox)
}

fn records_that_cannot_be_written_are_named_and_the_old_are_kept(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let old = Bundle::new(&sandbox, "old", &["sleep", "1000"])?;
    let new = Bundle::new(&sandbox, "new", &["true"])?;
    shim.create("old", old.path())?;
    let pid = shim.start("old")?;
    let records = sandbox.state_dir().join("tasks");
    // As a file system that the kernel has made read-only; this one can be undone.
    let immutable = Immutable::make(&records)?;
    let refusal = shim.create("new", new.path()).map_or_else(
        |error| error.to_string(),
        |pid| format!("created with pid {pid}"),
    );
    ensure!(
        refusal.contains("cannot write the task record"),
        "{refusal}"
    );
    sandbox.kill_daemon()?;
    ensure!(shim.state("old")?.pid == pid, "another pid");
    shim.kill("old", Signal::SIGKILL)?;
    ensure!(shim.wait("old")? == 137, "not 137");
    // Known again, by the kernel's record alone.
    sandbox.kill_daemon()?;
    ensure!(shim.wait("old")? == 137, "not 137");
    drop(immutable);
    ensure!(shim.delete("old")? == 137, "not 137");
    Ok(())
}

/// A directory in which nothing can be made or removed, while this lives.
struct Immutable(PathBuf);

impl Immutable {
    fn make(directory: &Path) -> anyhow::Result<Self> {
        let made = Self(directory.to_owned());
        ensure!(made.change("+i")?, "chattr failed");
        Ok(made)
    }

    fn change(&self, how: &str) -> anyhow::Result<bool> {
        let status = Command::new("chattr").arg(how).arg(&self.0).status()?;
        Ok(status.success())
    }
}

impl Drop for Immutable {
    fn drop(&mut self) {
        let _ = self.change("-i");
    }
}

fn what_could_not_be_kept_is_refused_by_name_and_what_runs_is_not_lost(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    // It keeps a third of what it may open, since it hands all of it on.
    let few = sandbox.directory().join("few");
    let embedshimd = stage.binary("embedshimd");
    let script = format!(
        "#!/bin/sh\nexec prlimit --nofile=150:150 {} \"$@\"\n",
        embedshimd.display()
    );
    fs::write(&few, script)?;
    fs::set_permissions(&few, fs::Permissions::from_mode(0o755))?;
    sandbox.start_daemon_of(&few)?;
    let mut shims = Vec::new();
    for _ in 0..52 {
        shims.push(Shim::connect(&sandbox)?);
    }
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    bundle.edit(|spec| spec["process"]["rlimits"] = Value::Null)?;
    let (first, last) = (&shims[0], &shims[51]);
    let refusal = last.create("c", bundle.path()).map_or_else(
        |error| error.to_string(),
        |pid| format!("created with pid {pid}"),
    );
    ensure!(
        refusal.contains("container c would be lost") && refusal.contains("RLIMIT_NOFILE"),
        "{refusal}"
    );
    let fifo = sandbox.directory().join("stdout");
    mkfifo(&fifo, Mode::S_IRWXU)?;
    // Its connection is kept, but its streams could not be.
    let refusal = first.create_with("c", bundle.path(), |request| {
        request.stdout = fifo.to_string_lossy().into_owned();
    });
    let refusal = refusal.map_or_else(|error| error.to_string(), |pid| pid.to_string());
    ensure!(refusal.contains("cannot store the streams"), "{refusal}");
    first.create("c", bundle.path())?;
    let pid = first.start("c")?;
    sandbox.kill_daemon()?;
    ensure!(
        last.state("c").is_err(),
        "its connection was kept after all"
    );
    ensure!(first.state("c")?.pid == pid, "another pid");
    first.kill("c", Signal::SIGKILL)?;
    ensure!(
        first.wait("c")? == 137 && first.delete("c")? == 137,
        "not 137"
    );
    Ok(())
}

fn what_an_earlier_boot_has_left_is_recognised(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    sandbox.end_daemon(Signal::SIGKILL)?;
    // After a boot its number is another's: here, of a process that must not come to harm.
    let mut stranger = Command::new("sleep").arg("1000").spawn()?;
    let result = boot(&sandbox, i32::try_from(stranger.id())?);
    stranger.kill()?;
    stranger.wait()?;
    result
}

fn boot(sandbox: &Sandbox, stranger: i32) -> anyhow::Result<()> {
    let record = sandbox
        .state_dir()
        .join("tasks")
        .join(format!("{}:c.json", sandbox.namespace()));
    let mut document: Value = serde_json::from_slice(&fs::read(&record)?)?;
    let pid = document
        .pointer("/init/identity/pid")
        .and_then(Value::as_i64)
        .context("no pid in the record")?;
    document["boot_id"] = "of another boot".into();
    document["init"]["identity"]["pid"] = stranger.into();
    fs::write(&record, document.to_string())?;
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(sandbox)?;
    ensure!(shim.wait("c")? == 255, "its end is known");
    ensure!(shim.delete("c")? == 255, "its end is known");
    ensure!(is_alive(stranger), "another's process was killed");
    ensure!(
        sandbox.daemon_log().contains("of an earlier boot"),
        "unsaid"
    );
    Ok(())
}

/// A clean-up of `/run` that meant something else: what only the daemon knows is written down
/// again, and outlives it then.
fn a_removed_state_directory_is_put_back(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    shim.create("c", bundle.path())?;
    let pid = shim.start("c")?;
    std::thread::scope(|scope| {
        let waiting = Shim::connect(&sandbox)?;
        let wait = scope.spawn(move || waiting.wait("c"));
        // The request is noted when it is in its connection's journal.
        let is_noted = || {
            let journals = fs::read_dir(sandbox.state_dir().join("connections"));
            let mut lengths = journals
                .into_iter()
                .flatten()
                .filter_map(|entry| Some(entry.ok()?.metadata().ok()?.len()));
            lengths.any(|length| length > 420)
        };
        let gone_on = || {
            until("the wait is noted", || Ok(is_noted()))?;
            for entry in fs::read_dir(sandbox.state_dir())? {
                let path = entry?.path();
                if path.is_dir() {
                    fs::remove_dir_all(path)?;
                } else {
                    fs::remove_file(path)?;
                }
            }
            until("everything is back", || {
                Ok(sandbox.state_dir().join("shim.sock").exists() && is_noted())
            })?;
            let old = sandbox.daemon_pid().context("the daemon is not there")?;
            kill(Pid::from_raw(old), Signal::SIGKILL)?;
            ensure!(shim.state("c")?.pid == pid, "another pid");
            ensure!(
                Shim::connect(&sandbox)?.state("c")?.pid == pid,
                "another pid"
            );
            Ok(old)
        };
        let old = gone_on();
        // Also when it has failed, or the wait would not end.
        shim.kill("c", Signal::SIGKILL)?;
        let code = wait.join().map_err(|_| anyhow::anyhow!("it panicked"))??;
        ensure!(code == 137 && shim.delete("c")? == 137, "{code}");
        let old = old?;
        ensure!(sandbox.successor_of(old)? != old, "it was not killed");
        Ok(())
    })
}

/// Two clients wait while the daemon dies, and a byte of each one's journal is wrong: of what was
/// asked, or of how long that is. Neither waits in vain, and both connections go on.
fn a_damaged_journal_costs_a_request_its_answer_at_most(stage: &Stage) -> anyhow::Result<()> {
    const IN_THE_LENGTH: usize = 384 + 5;
    const IN_THE_REQUEST: usize = 384 + 34 + 12;
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    let mut waits = Vec::new();
    let mut journals = Vec::<PathBuf>::new();
    let directory = sandbox.state_dir().join("connections");
    let all = || -> anyhow::Result<Vec<PathBuf>> {
        let entries = fs::read_dir(&directory)?;
        entries.map(|entry| Ok(entry?.path())).collect()
    };
    for _ in 0..2 {
        let others = all()?;
        let (client, (ended, has_ended)) = (Shim::connect(&sandbox)?, mpsc::channel());
        std::thread::spawn(move || {
            let code = client.wait("c");
            let _ = ended.send((code, client.state("c").map(|state| state.exit_status)));
        });
        until("the wait is noted", || {
            let noted = all()?.into_iter().find(|path| {
                let length = path.metadata().map_or(0, |found| found.len());
                !others.contains(path) && length > 420
            });
            journals.extend(noted.clone());
            Ok(noted.is_some())
        })?;
        waits.push(has_ended);
    }
    let old = sandbox.daemon_pid().context("the daemon is not there")?;
    let keeper = Pid::from_raw(sandbox.keeper_pid().context("no keeper")?);
    stop(keeper)?;
    let damage = || {
        kill(Pid::from_raw(old), Signal::SIGKILL)?;
        until("the daemon is dead", || Ok(!is_alive(old)))?;
        for (path, at) in journals.iter().zip([IN_THE_REQUEST, IN_THE_LENGTH]) {
            let mut bytes = fs::read(path)?;
            *bytes.get_mut(at).context("the journal is shorter")? ^= 0xff;
            fs::write(path, bytes)?;
        }
        anyhow::Ok(())
    };
    let damaged = damage();
    kill(keeper, Signal::SIGCONT)?;
    damaged?;
    sandbox.successor_of(old)?;
    shim.kill("c", Signal::SIGKILL)?;
    let limit = Duration::from_secs(30);
    let (lost, after_lost) = waits[0].recv_timeout(limit).context("a request hangs")?;
    let text = lost.map_or_else(|error| error.to_string(), |code| format!("code {code}"));
    ensure!(
        text.contains("DATA_LOSS") && text.contains("damaged"),
        "{text}"
    );
    ensure!(after_lost.is_ok(), "{after_lost:?}");
    let (whole, after_whole) = waits[1].recv_timeout(limit).context("a request hangs")?;
    ensure!(whole? == 137 && after_whole? == 137, "another code");
    ensure!(shim.delete("c")? == 137, "another code");
    Ok(())
}

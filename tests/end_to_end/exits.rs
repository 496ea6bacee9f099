//! How processes end and what containerd is told.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use containerd_shim_protos::api;
use embedshim_tests::{Bundle, Footprint, Shim, Stage, Test};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use serde_json::Value;
use testbed::sandbox::{Finished, PATIENCE, Running, Sandbox, until};

use crate::survival::handles_term;
use crate::tests;

pub(crate) const TESTS: [Test; 8] = tests!(AnyRuntime:
    exit_codes_are_exact,
    death_by_a_signal_is_128_and_its_number,
    the_process_counts_and_not_its_main_thread,
    an_init_that_reboots_ends_by_the_signal_that_stands_for_it,
    a_short_lived_container_never_loses_status_or_output,
    a_short_lived_exec_never_loses_status_or_output,
    a_grandchild_that_keeps_the_output_does_not_delay_the_exit,
    a_stopped_task_keeps_its_pid_and_status_until_deleted,
);

pub(crate) const OURS: [Test; 2] = tests!(EmbedshimOnly:
    with_a_shared_pid_namespace_the_rest_is_killed,
    an_exit_is_reported_although_its_cgroup_does_not_answer,
);

fn run(sandbox: &Sandbox, id: &str, command: &[&str]) -> anyhow::Result<Finished> {
    Running::capture(&mut sandbox.run(&["--rm"], id, command))?.finish(PATIENCE)
}

fn exit_codes_are_exact(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    for code in [0, 1, 2, 77, 126, 127, 128, 137, 255] {
        let finished = run(
            &sandbox,
            &format!("c{code}"),
            &["sh", "-c", &format!("exit {code}")],
        )?;
        ensure!(finished.code == Some(code), "{code}: {finished:?}");
    }
    Ok(())
}

fn death_by_a_signal_is_128_and_its_number(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let fault = run(&sandbox, "fault", &["guest", "fault"])?;
    ensure!(fault.code == Some(128 + 11), "SIGSEGV: {fault:?}");
    // The init of a pid namespace feels from outside only what it handles, and SIGKILL; so others
    // are for its children.
    for (name, number) in [("TERM", 15), ("KILL", 9), ("HUP", 1), ("USR1", 10)] {
        let script = format!("sh -c 'kill -{name} $$'");
        let finished = run(
            &sandbox,
            &format!("s{number}"),
            &["sh", "-c", &format!("{script}; exit $?")],
        )?;
        ensure!(finished.code == Some(128 + number), "{name}: {finished:?}");
    }
    let pid = sandbox.detached(&[], "killed", &["sleep", "1000"])?;
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    sandbox.wait_for_status("killed", "STOPPED")?;
    let code = sandbox.delete_task("killed")?;
    ensure!(code == 137, "{code}");
    Ok(())
}

fn the_process_counts_and_not_its_main_thread(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let finished = run(&sandbox, "c", &["guest", "leader-first", "44", "50"])?;
    ensure!(finished.code == Some(44), "{finished:?}");
    Ok(())
}

/// Each way to reboot a container, and its exit code: 128 and SIGINT or SIGHUP.
pub(crate) const REBOOTS: [(&str, i32); 3] = [("halt", 130), ("poweroff", 130), ("reboot", 129)];

/// Starts a container that reboots itself by this command when it is told to end. Its pid.
pub(crate) fn reboots_when_told(sandbox: &Sandbox, command: &str) -> anyhow::Result<i32> {
    let script = format!("trap 'exec busybox {command} -f' TERM; sleep 1000 & wait");
    let options = ["--cap-add", "CAP_SYS_BOOT"];
    let pid = sandbox.detached(&options, command, &["sh", "-c", &script])?;
    handles_term(pid)?;
    Ok(pid)
}

/// As init systems do in containers. The status is the kernel's, whatever the parent is.
fn an_init_that_reboots_ends_by_the_signal_that_stands_for_it(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    for (command, code) in REBOOTS {
        let pid = reboots_when_told(&sandbox, command)?;
        kill(Pid::from_raw(pid), Signal::SIGTERM)?;
        sandbox.wait_for_status(command, "STOPPED")?;
        let told = sandbox.delete_task(command)?;
        ensure!(told == code, "{command}: {told} instead of {code}");
    }
    Ok(())
}

fn a_short_lived_container_never_loses_status_or_output(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    for number in 0..40 {
        let finished = run(
            &sandbox,
            &format!("c{number}"),
            &["sh", "-c", &format!("echo {number}; exit {number}")],
        )?;
        let right = finished.code == Some(number) && finished.stdout == format!("{number}\n");
        ensure!(right, "{number}: {finished:?}");
    }
    Ok(())
}

fn a_short_lived_exec_never_loses_status_or_output(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&[], "c", &["sleep", "1000"])?;
    for number in 0..60 {
        let id = format!("e{number}");
        let mut ctr = sandbox.ctr(["task", "exec", "--fifo-dir"]);
        ctr.arg(sandbox.directory().join("fifo"))
            .args(["--exec-id", &id, "c"]);
        let command = format!("echo {number}; exit {number}");
        let finished = Running::capture(ctr.args(["sh", "-c", &command]))?.finish(PATIENCE)?;
        let right = finished.code == Some(number) && finished.stdout == format!("{number}\n");
        ensure!(right, "{number}: {finished:?}");
    }
    Ok(())
}

fn a_grandchild_that_keeps_the_output_does_not_delay_the_exit(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&[], "c", &["sleep", "1000"])?;
    let mut ctr = sandbox.ctr([
        "task",
        "exec",
        "--detach",
        "--exec-id",
        "e",
        "c",
        "guest",
        "orphan",
        "20000",
    ]);
    Running::capture(&mut ctr)?.finish(PATIENCE)?;
    // Far less than the grandchild's 20 s: the exec is not listed any more, its grandchild is.
    until("the exec is reported as ended", || {
        let list = sandbox.ctr_ok(&["task", "ps", "c"])?;
        let is_listed = list.contains("ExecID:e") || list.contains("exec_id");
        Ok(list.lines().count() == 3 && !is_listed)
    })
}

fn with_a_shared_pid_namespace_the_rest_is_killed(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", "sleep 1000 & exit 4"])?;
    bundle.edit(|spec| {
        let namespaces = spec
            .pointer_mut("/linux/namespaces")
            .and_then(Value::as_array_mut);
        if let Some(namespaces) = namespaces {
            namespaces
                .retain(|namespace| namespace.get("type").and_then(Value::as_str) != Some("pid"));
        }
    })?;
    let before = Footprint::of(&sandbox);
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    let code = shim.wait("c")?;
    ensure!(code == 4, "{code}");
    // Were the sleeping child alive, its cgroup could not be removed.
    shim.delete("c")?;
    before.wait_for_return(&sandbox)
}

fn a_stopped_task_keeps_its_pid_and_status_until_deleted(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    let pid = sandbox.detached(&[], "c", &["sh", "-c", "exit 12"])?;
    ensure!(pid > 0, "a short-lived container lost its pid");
    sandbox.wait_for_status("c", "STOPPED")?;
    ensure!(sandbox.task("c")?.pid == pid, "the pid changed");
    let code = sandbox.delete_task("c")?;
    ensure!(code == 12, "{code}");
    ensure!(sandbox.find_task("c")?.is_none(), "the task is still there");
    Ok(())
}

/// A cgroup's file, replaced by a fifo that is open on no side: a process that opens it waits.
struct Deaf {
    file: PathBuf,
    fifo: PathBuf,
}

impl Deaf {
    /// The file that counts the OOM kills of a process's cgroup.
    fn oom_counter(sandbox: &Sandbox, pid: u32) -> anyhow::Result<Self> {
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let of = |line: &str| -> Option<PathBuf> {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
            match controllers {
                "" => Some(Path::new("/sys/fs/cgroup").join(path).join("memory.events")),
                "memory" => {
                    let directory = Path::new("/sys/fs/cgroup/memory").join(path);
                    Some(directory.join("memory.oom_control"))
                }
                _ => None,
            }
        };
        let mut files = cgroups.lines().filter_map(of).filter(|file| file.exists());
        let file = files.next().context("no file counts OOM kills")?;
        let fifo = sandbox.directory().join("deaf");
        mkfifo(&fifo, Mode::S_IRWXU)?;
        let flags = MsFlags::MS_BIND;
        mount(Some(&fifo), &file, None::<&str>, flags, None::<&str>)?;
        Ok(Self { file, fifo })
    }
}

impl Drop for Deaf {
    fn drop(&mut self) {
        let _ = umount2(&self.file, MntFlags::MNT_DETACH);
        // What waits reads the end.
        let _ = fs::OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&self.fifo);
    }
}

fn an_exit_is_reported_although_its_cgroup_does_not_answer(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let pid = shim.create("c", bundle.path())?;
    shim.start("c")?;
    let deaf = Deaf::oom_counter(&sandbox, pid)?;
    shim.kill("c", Signal::SIGKILL)?;
    let told = until("the exit is published", || {
        Ok(shim.state("c")?.status() == api::Status::STOPPED)
    });
    drop(deaf);
    told?;
    ensure!(
        shim.wait("c")? == 137 && shim.delete("c")? == 137,
        "not 137"
    );
    Ok(())
}

//! A hundred things that do not answer, of each kind, beside a container that notices none of them.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use containerd_shim_protos::api;
use embedshim_tests::{Bundle, Reader, Shim, Stage, Test, binary_name, write_program};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use testbed::sandbox::{PATIENCE, Running, Sandbox, until};

use crate::tests;

pub(crate) const TESTS: [Test; 7] = tests!(EmbedshimOnly:
    a_container_that_holds_its_pipes_lock_holds_up_nothing_else,
    loggers_that_are_never_ready_hold_up_nothing_else,
    log_files_that_cannot_be_opened_hold_up_nothing_else,
    runtimes_that_cannot_be_executed_hold_up_nothing_else,
    root_filesystems_that_cannot_be_mounted_hold_up_nothing_else,
    a_frozen_log_file_system_holds_up_nothing_else,
    a_terminal_on_a_frozen_log_file_system_holds_up_nothing_else,
);

const MANY: usize = 100;

/// A FUSE file system whose server never answers, until it is dropped: then everything that waits
/// fails.
struct Silent {
    server: Option<File>,
    at: PathBuf,
}

impl Silent {
    fn mount(sandbox: &Sandbox) -> anyhow::Result<Self> {
        let at = sandbox.directory().join("silent");
        fs::create_dir(&at)?;
        let server = File::options().read(true).write(true).open("/dev/fuse")?;
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            server.as_raw_fd()
        );
        mount(
            Some("silent"),
            &at,
            Some("fuse"),
            MsFlags::empty(),
            Some(options.as_str()),
        )?;
        Ok(Self {
            server: Some(server),
            at,
        })
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        drop(self.server.take());
        let _ = umount2(&self.at, MntFlags::MNT_DETACH);
    }
}

/// An ext4 in a file, frozen until it is dropped.
pub(crate) struct Frozen {
    pub(crate) at: PathBuf,
}

impl Frozen {
    pub(crate) fn mount(sandbox: &Sandbox) -> anyhow::Result<Self> {
        let (image, at) = (
            sandbox.directory().join("disk"),
            sandbox.directory().join("frozen"),
        );
        File::create(&image)?.set_len(16 << 20)?;
        fs::create_dir(&at)?;
        run(Command::new("mkfs.ext4").arg("-q").arg(&image))?;
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&image)
            .arg(&at))?;
        Ok(Self { at })
    }

    pub(crate) fn freeze(&self) -> anyhow::Result<()> {
        run(Command::new("fsfreeze").arg("--freeze").arg(&self.at))
    }

    pub(crate) fn thaw(&self) -> anyhow::Result<()> {
        run(Command::new("fsfreeze").arg("--unfreeze").arg(&self.at))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = self.thaw();
        let _ = run(Command::new("umount").arg("--lazy").arg(&self.at));
    }
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {said}");
    Ok(())
}

fn start(stage: &Stage) -> anyhow::Result<Sandbox> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    Ok(sandbox)
}

/// A whole life with a stream, and how long it took.
fn live(sandbox: &Sandbox, shim: &Shim, id: &str) -> anyhow::Result<Duration> {
    let bundle = Bundle::new(sandbox, id, &["sh", "-c", "echo here; exit 4"])?;
    let mut reader = Reader::new(sandbox, &format!("{id}-out"))?;
    let began = Instant::now();
    shim.create_with(id, bundle.path(), |request| request.stdout = reader.path())?;
    shim.start(id)?;
    let code = shim.wait(id)?;
    let text = reader.finish()?;
    shim.delete(id)?;
    ensure!(code == 4 && text == "here\n", "{code} {text:?}");
    Ok(began.elapsed())
}

fn median_life(sandbox: &Sandbox, shim: &Shim, word: &str) -> anyhow::Result<Duration> {
    let mut lives = (0..5)
        .map(|number| live(sandbox, shim, &format!("{word}{number}")))
        .collect::<anyhow::Result<Vec<_>>>()?;
    lives.sort_unstable();
    Ok(lives[2])
}

/// Lives before and beside what hangs. The machine is busy with tests, so a short life is not
/// measured finely.
fn beside(sandbox: &Sandbox, hang: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let shim = Shim::connect(sandbox)?;
    let undisturbed = Undisturbed::measure(sandbox, &shim)?;
    hang()?;
    is_undisturbed(sandbox, &shim, undisturbed)
}

/// What a life takes when nothing hangs.
#[derive(Clone, Copy, Debug)]
struct Undisturbed {
    life: Duration,
    /// What the same runtime took without a daemon: how busy the machine was.
    bare: Duration,
}

impl Undisturbed {
    fn measure(sandbox: &Sandbox, shim: &Shim) -> anyhow::Result<Self> {
        Ok(Self {
            life: median_life(sandbox, shim, "before")?,
            bare: bare_life(sandbox, "bare")?,
        })
    }
}

/// A container by the runtime alone, the fastest of three.
fn bare_life(sandbox: &Sandbox, word: &str) -> anyhow::Result<Duration> {
    let root = sandbox.directory().join("bare");
    let mut fastest = Duration::MAX;
    for number in 0..3 {
        let id = format!("{word}{number}");
        let bundle = Bundle::new(sandbox, &id, &["true"])?;
        let began = Instant::now();
        run(Command::new("runc")
            .arg("--root")
            .arg(&root)
            .args(["run", "--bundle"])
            .arg(bundle.path())
            .arg(&id))?;
        fastest = fastest.min(began.elapsed());
    }
    Ok(fastest)
}

/// Other tests can slow a life down; what holds it up does so each time, and leaves the bare
/// runtime as quick as it was.
fn is_undisturbed(sandbox: &Sandbox, shim: &Shim, before: Undisturbed) -> anyhow::Result<()> {
    const ATTEMPTS: usize = 5;
    let limit = before.life.max(Duration::from_millis(150)) * 2;
    let mut told = Vec::new();
    for attempt in 0..ATTEMPTS {
        let life = median_life(sandbox, shim, &format!("beside{attempt}-"))?;
        if life <= limit {
            return Ok(());
        }
        let bare = bare_life(sandbox, &format!("bare{attempt}-"))?;
        let slower = bare.as_secs_f64() / before.bare.as_secs_f64();
        if life <= limit.mul_f64(slower.max(1.0)) {
            return Ok(());
        }
        told.push((life, bare));
    }
    bail!("life and bare life: {told:?} beside them, {before:?} without")
}

/// Lets a hundred creations hang, each on a connection of its own, and lives beside them until they
/// are let go.
fn creations(
    sandbox: &Sandbox,
    request: impl Fn(&mut api::CreateTaskRequest, usize) + Sync,
    is_hanging: impl Fn() -> bool,
    let_go: impl FnOnce(),
) -> anyhow::Result<()> {
    let bundles = (0..MANY)
        .map(|number| Bundle::new(sandbox, &format!("h{number}"), &["true"]))
        .collect::<anyhow::Result<Vec<_>>>()?;
    std::thread::scope(|scope| {
        let mut hanging = Vec::new();
        let result = beside(sandbox, || {
            for (number, bundle) in bundles.iter().enumerate() {
                let shim = Shim::connect(sandbox)?;
                let request = &request;
                hanging.push(scope.spawn(move || {
                    let id = format!("h{number}");
                    shim.create_with(&id, bundle.path(), |more| request(more, number))
                }));
            }
            until("they hang", || Ok(is_hanging()))
        });
        let has_answer = hanging
            .iter()
            .filter(|request| request.is_finished())
            .count();
        let_go();
        for request in hanging {
            let answer = request.join().map_err(|_| anyhow::anyhow!("it panicked"))?;
            ensure!(answer.is_err(), "it was created: {answer:?}");
        }
        result?;
        ensure!(has_answer == 0, "{has_answer} were answered");
        Ok(())
    })
}

fn threads_of(sandbox: &Sandbox) -> usize {
    let daemon = sandbox.daemon_pid().unwrap_or(0);
    fs::read_dir(format!("/proc/{daemon}/task")).map_or(0, Iterator::count)
}

fn loggers_that_are_never_ready_hold_up_nothing_else(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = start(stage)?;
    let started = sandbox.directory().join("started");
    fs::create_dir(&started)?;
    let logger = sandbox.directory().join("logger");
    let script = format!(
        "#!/bin/sh\necho $$ > {}/$CONTAINER_ID\nexec /bin/sleep 1000\n",
        started.display()
    );
    write_program(&logger, &script)?;
    // The second version fails when it ends without a word.
    let uri = format!("binary-v2://{}", logger.display());
    let pids = || -> Vec<i32> {
        let files = fs::read_dir(&started).into_iter().flatten().flatten();
        files
            .filter_map(|file| fs::read_to_string(file.path()).ok()?.trim().parse().ok())
            .collect()
    };
    creations(
        &sandbox,
        |request, _| request.stdout.clone_from(&uri),
        || pids().len() == MANY,
        || {
            for pid in pids() {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM);
            }
        },
    )
}

fn log_files_that_cannot_be_opened_hold_up_nothing_else(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = start(stage)?;
    let mut silent = Silent::mount(&sandbox)?;
    let directory = silent.at.clone();
    let server = silent.server.take();
    creations(
        &sandbox,
        |request, number| request.stdout = format!("file://{}/log{number}", directory.display()),
        || threads_of(&sandbox) > MANY,
        || drop(server),
    )
}

fn runtimes_that_cannot_be_executed_hold_up_nothing_else(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = start(stage)?;
    let mut silent = Silent::mount(&sandbox)?;
    let program = silent.at.join("runc");
    let server = silent.server.take();
    creations(
        &sandbox,
        |request, _| request.options = binary_name(&program),
        || threads_of(&sandbox) > MANY,
        || drop(server),
    )
}

fn root_filesystems_that_cannot_be_mounted_hold_up_nothing_else(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = start(stage)?;
    let mut silent = Silent::mount(&sandbox)?;
    let source = silent.at.join("root").display().to_string();
    let server = silent.server.take();
    creations(
        &sandbox,
        |request, _| {
            let mount = containerd_shim_protos::types::mount::Mount {
                type_: "bind".into(),
                source: source.clone(),
                options: vec!["rbind".into(), "ro".into()],
                ..Default::default()
            };
            request.rootfs = vec![mount];
        },
        || threads_of(&sandbox) > MANY,
        || drop(server),
    )
}

/// A hundred execs that write to it, and go on when it answers.
fn a_frozen_log_file_system_holds_up_nothing_else(stage: &Stage) -> anyhow::Result<()> {
    on_frozen(stage, MANY, false)
}

fn a_terminal_on_a_frozen_log_file_system_holds_up_nothing_else(
    stage: &Stage,
) -> anyhow::Result<()> {
    on_frozen(stage, 20, true)
}

fn on_frozen(stage: &Stage, count: usize, terminal: bool) -> anyhow::Result<()> {
    let sandbox = start(stage)?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    let frozen = Frozen::mount(&sandbox)?;
    let execs: Vec<String> = (0..count).map(|number| format!("e{number}")).collect();
    for exec in &execs {
        let log = frozen.at.join(exec).display().to_string();
        let script = "while [ ! -e /dev/shm/go ]; do sleep 0.1; done; seq 3000 || busybox seq 3000";
        shim.exec_with("c", exec, &["sh", "-c", script], |request| {
            request.terminal = terminal;
            request.stdout = format!("file://{log}");
        })?;
        shim.start_exec("c", exec)?;
    }
    frozen.freeze()?;
    let pid = shim.state("c")?.pid;
    let result = beside(&sandbox, || {
        File::create(format!("/proc/{pid}/root/dev/shm/go"))?;
        until("they hang", || Ok(threads_of(&sandbox) > count))
    });
    let asked = Instant::now();
    shim.state("c")?;
    let took = asked.elapsed();
    frozen.thaw()?;
    result?;
    ensure!(took < Duration::from_millis(500), "State took {took:?}");
    for exec in &execs {
        shim.wait_exec("c", exec)?;
        shim.delete_exec("c", exec)?;
        let text = fs::read_to_string(frozen.at.join(exec))?;
        let last = text.lines().last().unwrap_or_default();
        ensure!(
            last.trim() == "3000" && text.lines().count() >= 3000,
            "{exec}: {last:?}"
        );
    }
    shim.kill("c", Signal::SIGKILL)?;
    shim.wait("c")?;
    shim.delete("c")?;
    Ok(())
}

/// Whatever wants the lock waits uninterruptibly: moving bytes, closing the pipe. That is nothing
/// to others, nor to the exec's client.
fn a_container_that_holds_its_pipes_lock_holds_up_nothing_else(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    sandbox.detached(&["--null-io"], "c", &["sleep", "1000"])?;
    let shim = Shim::connect(&sandbox)?;
    let undisturbed = Undisturbed::measure(&sandbox, &shim)?;
    for number in 0..6 {
        let exec = format!("e{number}");
        // At once the daemon is taking what was said; later it waits for more.
        let pause = number % 2;
        let script = format!("echo said; sleep {pause}; guest hold-output & sleep 0.3; exit 3");
        let arguments = ["task", "exec", "--exec-id", &exec, "c", "sh", "-c", &script];
        let mut client = Running::capture(&mut sandbox.ctr(arguments))?;
        let finished = client.finish(PATIENCE)?;
        ensure!(
            finished.code == Some(3) && finished.stdout == "said\n",
            "{finished:?}"
        );
    }
    is_undisturbed(&sandbox, &shim, undisturbed)?;
    // Nor to the daemon's end and to the next one.
    let next = sandbox.kill_daemon()?;
    ensure!(sandbox.task("c")?.status == "RUNNING", "the next: {next}");
    // What holds the locks ends with its container, and with it what waits for them.
    sandbox.ctr_ok(&["task", "kill", "--signal", "KILL", "c"])?;
    sandbox.wait_for_status("c", "STOPPED")?;
    ensure!(sandbox.delete_task("c")? == 137, "the code was lost");
    sandbox.kill_daemon().map(drop)
}

//! What a process has written right before its end reaches a client that closes its ends as soon as
//! it hears of the exit, as Go's containerd client does; and no exit waits for a client that does
//! not read.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Footprint, Shim, Stage, Test};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use testbed::sandbox::{Sandbox, until};

use crate::tests;

pub(crate) const TESTS: [Test; 3] = tests!(EmbedshimOnly:
    a_client_that_closes_its_ends_at_the_exit_has_everything,
    an_exit_does_not_wait_for_a_client_that_does_not_read,
    ctr_prints_everything_into_a_slow_pipe,
);

/// More than three pipes of the largest size hold.
const LINES: usize = 500_000;

/// Reads slowly, and closes its end when it is told to: what it has not read then is lost.
struct Closing {
    path: PathBuf,
    is_closed: Arc<AtomicBool>,
    thread: JoinHandle<std::io::Result<usize>>,
}

impl Closing {
    fn new(sandbox: &Sandbox, name: &str) -> anyhow::Result<Self> {
        let path = sandbox.directory().join(name);
        nix::unistd::mkfifo(&path, Mode::S_IRWXU)?;
        let is_closed = Arc::new(AtomicBool::new(false));
        let (fifo, closed) = (path.clone(), Arc::clone(&is_closed));
        let thread = std::thread::spawn(move || read_slowly(&fifo, &closed));
        Ok(Self {
            path,
            is_closed,
            thread,
        })
    }

    fn path(&self) -> String {
        self.path.display().to_string()
    }

    /// The client has heard of the exit. How many lines it has read.
    fn close(self) -> anyhow::Result<usize> {
        self.is_closed.store(true, Ordering::SeqCst);
        let lines = self.thread.join();
        Ok(lines.map_err(|_| anyhow::anyhow!("the reader panicked"))??)
    }
}

fn read_slowly(path: &Path, is_closed: &AtomicBool) -> std::io::Result<usize> {
    let mut file = File::open(path)?;
    // Closing interrupts a read in Go.
    fcntl(&file, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let mut piece = vec![0; 64 << 10];
    let mut text = Vec::new();
    while !is_closed.load(Ordering::SeqCst) {
        match file.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => text.extend_from_slice(piece.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(text.lines().count())
}

/// Gone, or a zombie.
fn has_ended(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_none_or(|(_, fields)| fields.starts_with('Z'))
}

/// A container and an exec, each with a pipe and with a terminal.
fn a_client_that_closes_its_ends_at_the_exit_has_everything(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let before = Footprint::of(&sandbox);
    let script = format!("busybox seq {LINES}");
    for terminal in [false, true] {
        let name = if terminal { "terminal" } else { "pipe" };
        let bundle = Bundle::new(&sandbox, name, &["sh", "-c", &script])?;
        bundle.edit(|spec| spec["process"]["terminal"] = terminal.into())?;
        let client = Closing::new(&sandbox, &format!("{name}-out"))?;
        shim.create_with(name, bundle.path(), |request| {
            request.stdout = client.path();
            request.terminal = terminal;
        })?;
        let pid = i32::try_from(shim.start(name)?)?;
        // And though the daemon is killed while the exit waits for the client.
        until("it has ended", || Ok(has_ended(pid)))?;
        let ended = Instant::now();
        sandbox.kill_daemon()?;
        shim.wait(name)?;
        let took = ended.elapsed();
        let lines = client.close()?;
        ensure!(
            lines == LINES,
            "{name} of an init: {lines} lines, told {took:?} after the end"
        );
        shim.delete(name)?;

        let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
        shim.create("c", bundle.path())?;
        shim.start("c")?;
        let client = Closing::new(&sandbox, &format!("{name}-exec"))?;
        shim.exec_with("c", name, &["sh", "-c", &script], |request| {
            request.stdout = client.path();
            request.terminal = terminal;
        })?;
        shim.start_exec("c", name)?;
        shim.wait_exec("c", name)?;
        let lines = client.close()?;
        ensure!(lines == LINES, "{name} of an exec: {lines} lines");
        shim.delete_exec("c", name)?;
        shim.kill("c", Signal::SIGKILL)?;
        shim.wait("c")?;
        shim.delete("c")?;
    }
    before.wait_for_return(&sandbox)
}

/// A client that has not come at all, and one that reads without end what others write.
fn an_exit_does_not_wait_for_a_client_that_does_not_read(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", "echo unread; exit 3"])?;
    let fifo = sandbox.directory().join("unread");
    nix::unistd::mkfifo(&fifo, Mode::S_IRWXU)?;
    shim.create_with("c", bundle.path(), |request| {
        request.stdout = fifo.display().to_string();
    })?;
    let started = Instant::now();
    shim.start("c")?;
    ensure!(shim.wait("c")? == 3, "not 3");
    let took = started.elapsed();
    ensure!(took < Duration::from_secs(3), "Wait took {took:?}");
    let mut text = String::new();
    let mut reader = OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(fifo)?;
    reader.read_to_string(&mut text)?;
    shim.delete("c")?;
    ensure!(text == "unread\n", "{text:?}");

    let bundle = Bundle::new(&sandbox, "d", &["sleep", "1000"])?;
    shim.create("d", bundle.path())?;
    shim.start("d")?;
    let client = Closing::new(&sandbox, "endless")?;
    let script = "busybox yes & sleep 0.1; exit 4";
    shim.exec_with("d", "e", &["sh", "-c", script], |request| {
        request.stdout = client.path();
    })?;
    let started = Instant::now();
    shim.start_exec("d", "e")?;
    ensure!(shim.wait_exec("d", "e")? == 4, "not 4");
    let took = started.elapsed();
    ensure!(took < Duration::from_secs(9), "Wait took {took:?}");
    client.close()?;
    shim.kill("d", Signal::SIGKILL)?;
    shim.wait("d")?;
    shim.delete("d")
        .context("the container cannot be deleted")?;
    Ok(())
}

/// `ctr run`, of which the reader is slower than the container.
fn ctr_prints_everything_into_a_slow_pipe(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.sandbox()?;
    for round in 0..3 {
        let flood = ["guest", "flood", "50000"];
        let mut command = sandbox.run(&["--rm"], &format!("c{round}"), &flood);
        let mut client = command.stdout(Stdio::piped()).spawn()?;
        let mut stdout = client.stdout.take().context("no pipe")?;
        let (mut piece, mut text) = (vec![0; 32 << 10], Vec::new());
        loop {
            let count = stdout.read(&mut piece)?;
            if count == 0 {
                break;
            }
            text.extend_from_slice(piece.get(..count).unwrap_or_default());
            std::thread::sleep(Duration::from_millis(1));
        }
        let (status, lines) = (client.wait()?, text.lines().count());
        ensure!(
            status.code() == Some(0) && lines == 50_000,
            "{lines} lines, {status}"
        );
    }
    Ok(())
}

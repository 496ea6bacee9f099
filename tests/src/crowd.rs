//! [`Crowd`]: thousands of containers with three streams each, whose processes are small ones
//! without namespaces, so that making them takes no longer than the daemon needs. Owns the clients'
//! ends of their streams, and what it means that all of them still flow.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, ensure};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

use crate::shim::{Shim, binary_name};

/// Requests under way at once.
const THREADS: usize = 4;
/// How long an answer may take, in milliseconds.
const PATIENCE: u16 = 30_000;
/// What a container says that gets `SIGUSR1`: see `tests/crowd/echo_runtime.c`.
const WOKEN: &str = "woken\n";

/// How far the containers are that are added, and what they have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// They are created, with three fifos, and were not started yet.
    Created,
    /// They run, with three fifos.
    Running,
}

/// Containers of one daemon.
#[derive(Debug)]
pub struct Crowd {
    state_dir: PathBuf,
    directory: PathBuf,
    runtime: PathBuf,
    shims: Vec<Shim>,
    members: Vec<Member>,
}

/// One of them, and what its clients have open.
#[derive(Debug)]
struct Member {
    id: String,
    kind: Kind,
    pid: i32,
    input: File,
    outputs: [File; 2],
    _connection: UnixStream,
}

impl Crowd {
    /// Connects to the daemon that serves a state directory. There is no container yet; they are
    /// made below a directory, by the compiled `echo_runtime.c`.
    pub fn new(
        state_dir: &Path,
        namespace: &str,
        directory: &Path,
        runtime: &Path,
    ) -> anyhow::Result<Self> {
        let connect = |_| Shim::at(state_dir, namespace);
        Ok(Self {
            state_dir: state_dir.into(),
            directory: directory.into(),
            runtime: runtime.into(),
            shims: (0..THREADS).map(connect).collect::<Result<_, _>>()?,
            members: Vec::new(),
        })
    }

    /// Makes this many containers more, each with a connection, as containerd has one.
    pub fn add(&mut self, count: usize, kind: Kind) -> anyhow::Result<()> {
        let first = self.members.len();
        let added = by_all(&self.shims, count, |shim, number| {
            let id = format!("crowd{}", first + number);
            self.one(shim, &id, kind).context(id)
        })?;
        self.members.extend(added);
        Ok(())
    }

    fn one(&self, shim: &Shim, id: &str, kind: Kind) -> anyhow::Result<Member> {
        let connection = UnixStream::connect(self.state_dir.join("shim.sock"))?;
        let bundle = self.directory.join(id);
        fs::create_dir_all(bundle.join("rootfs"))?;
        // A pid namespace is not made, but said to be there: otherwise the daemon would look for
        // the rest of the container at its end.
        let spec = r#"{"ociVersion": "1.0.2", "process": {"args": ["echo"], "cwd": "/"},
            "root": {"path": "rootfs"}, "linux": {"namespaces": [{"type": "pid"}]}}"#;
        fs::write(bundle.join("config.json"), spec)?;
        let open = |name| -> anyhow::Result<(String, File)> {
            let path = bundle.join(name);
            mkfifo(&path, Mode::S_IRWXU)?;
            let mut options = OpenOptions::new();
            let options = options.read(true).write(true);
            let file = options.custom_flags(OFlag::O_NONBLOCK.bits()).open(&path)?;
            Ok((path.display().to_string(), file))
        };
        let (stdin, input) = open("in")?;
        let (stdout, output) = open("out")?;
        let (stderr, errors) = open("err")?;
        let pid = shim.create_with(id, &bundle, |request| {
            request.options = binary_name(&self.runtime);
            request.stdin = stdin;
            request.stdout = stdout;
            request.stderr = stderr;
        })?;
        if kind == Kind::Running {
            shim.start(id)?;
        }
        Ok(Member {
            id: id.into(),
            kind,
            pid: i32::try_from(pid)?,
            input,
            outputs: [output, errors],
            _connection: connection,
        })
    }

    /// Ends and deletes all of them.
    pub fn delete(&mut self) -> anyhow::Result<()> {
        by_all(&self.shims, self.members.len(), |shim, number| {
            let member = self.members.get(number).context("no such container")?;
            // One that was created only is ended by its deletion.
            if member.kind != Kind::Created {
                shim.kill(&member.id, Signal::SIGKILL)?;
                shim.wait(&member.id)?;
            }
            shim.delete(&member.id).context(member.id.clone())
        })?;
        self.members.clear();
        Ok(())
    }

    /// Demands that each container's outputs still flow, and the inputs of those that run.
    pub fn ensure_flowing(&self) -> anyhow::Result<()> {
        by_all(&self.shims, self.members.len(), |_, number| {
            let member = self.members.get(number).context("no such container")?;
            member.ensure_flowing().with_context(|| member.id.clone())
        })
        .map(drop)
    }
}

/// Does something with each number below `count`, on all connections at once; the results are in
/// no order.
fn by_all<T: Send>(
    shims: &[Shim],
    count: usize,
    work: impl Fn(&Shim, usize) -> anyhow::Result<T> + Sync,
) -> anyhow::Result<Vec<T>> {
    let next = AtomicUsize::new(0);
    let run = |shim| {
        let mut done = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return Ok(done);
            }
            done.push(work(shim, number)?);
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = shims.iter().map(|shim| scope.spawn(|| run(shim))).collect();
        let mut all = Vec::with_capacity(count);
        for thread in threads {
            let done: anyhow::Result<Vec<T>> = thread
                .join()
                .map_err(|_| anyhow::anyhow!("a thread panicked"))?;
            all.extend(done?);
        }
        Ok(all)
    })
}

impl Member {
    fn ensure_flowing(&self) -> anyhow::Result<()> {
        let said = if self.kind == Kind::Running {
            let said = format!("{}\n", self.id);
            let mut input = &self.input;
            input.write_all(said.as_bytes())?;
            said
        } else {
            kill(Pid::from_raw(self.pid), Signal::SIGUSR1)?;
            WOKEN.into()
        };
        for mut output in &self.outputs {
            let mut heard = Vec::new();
            while heard.len() < said.len() {
                let mut polled = [PollFd::new(output.as_fd(), PollFlags::POLLIN)];
                let count = poll(&mut polled, PollTimeout::from(PATIENCE))?;
                ensure!(count > 0, "nothing comes");
                let mut part = [0; 64];
                let count = output.read(&mut part)?;
                heard.extend_from_slice(part.get(..count).unwrap_or_default());
            }
            let heard = String::from_utf8_lossy(&heard);
            ensure!(heard == said, "{heard}");
        }
        Ok(())
    }
}

/// What the process of a descriptor store holds for others.
#[derive(Clone, Copy, Debug)]
pub struct Stored {
    /// Its open sockets: connections, and those in whose queues the descriptors of processes are.
    pub entries: usize,
    /// The descriptors in these queues.
    pub queued: usize,
}

impl Stored {
    /// Looks at systemd or the keeper.
    pub fn by(pid: i32) -> anyhow::Result<Self> {
        let mut stored = Self {
            entries: 0,
            queued: 0,
        };
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            let link = fs::read_link(entry.path()).unwrap_or_default();
            if !link.to_string_lossy().starts_with("socket:") {
                continue;
            }
            stored.entries += 1;
            let info = Path::new("/proc")
                .join(format!("{pid}/fdinfo"))
                .join(entry.file_name());
            let info = fs::read_to_string(info).unwrap_or_default();
            let count = info.lines().find_map(|line| line.strip_prefix("scm_fds:"));
            stored.queued += count
                .and_then(|count| count.trim().parse::<usize>().ok())
                .unwrap_or(0);
        }
        Ok(stored)
    }

    /// What has come since.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            entries: self.entries.saturating_sub(earlier.entries),
            queued: self.queued.saturating_sub(earlier.queued),
        }
    }

    /// All of them.
    pub fn all(self) -> usize {
        self.entries + self.queued
    }
}

/// Lets this process have as many files open as it may: a crowd's clients have four each.
pub fn raise_open_files() -> anyhow::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

//! Both ends of a process's streams: [`prepare`] makes them before the runtime is called, [`Streams`] lets bytes flow between them
//! afterwards. Owns which ends there are, and that both are stored before anything can flow; never interprets what flows.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::flow::{AtEnd, Course, Flow};
use super::open::{self, Pipe};
use super::plan::{Output, Plan};
use super::pump::Label;
use super::{LoggerPipes, StdioError};
use crate::fdstore::{FdRole, ProcessFds};
use crate::process::ProcessIdentity;
use crate::sys;

/// An init's output that somebody outside of its container still has open is over when nothing has come for this long.
const HOLDERS: Duration = Duration::from_secs(2);
/// The same for a terminal: long enough for the kernel's own buffering, which goes through a work queue.
const SILENCE: Duration = Duration::from_millis(200);

const CLIENT_ENDS: [FdRole; 3] = [
    FdRole::StdinClient,
    FdRole::StdoutClient,
    FdRole::StderrClient,
];
const PIPES: [FdRole; 5] = [
    FdRole::StdinPipe,
    FdRole::StdoutPipe,
    FdRole::StderrPipe,
    FdRole::Terminal,
    FdRole::Console,
];

/// The streams for the process. Its starter lets go of them right after: a writer of ours would hide the end.
#[derive(Debug)]
pub(crate) struct ChildStdio {
    /// Its input.
    pub(crate) stdin: OwnedFd,
    /// Its output.
    pub(crate) stdout: OwnedFd,
    /// Its error output.
    pub(crate) stderr: OwnedFd,
}

/// Which pipes a process has, by inode: how they are found again if nothing but the process has them any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PipeInodes {
    stdin: Option<u64>,
    stdout: Option<u64>,
    stderr: Option<u64>,
}

impl PipeInodes {
    /// Whether it has none: its streams are null, a terminal or a logger's.
    pub(crate) fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// What kind of process the streams are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Of {
    /// A container's first process.
    Init,
    /// Another one.
    Exec,
}

/// Opens the client's ends, or takes those that an earlier attempt has left in the set, makes new pipes, and stores all of it. Blocks on
/// the file system, never on a missing peer. `owner` is the owner of the pipes. `logger` are the pipes of the logger, if there is one.
pub(crate) fn prepare(
    plan: &Plan,
    of: Of,
    owner: Option<(u32, u32)>,
    logger: Option<LoggerPipes>,
    fds: &ProcessFds,
) -> Result<ChildStdio, StdioError> {
    let failed = |source| StdioError::Pipe { source };
    let (logged_stdout, logged_stderr) = logger.map(|pipes| (pipes.stdout, pipes.stderr)).unzip();
    let mut set = Vec::new();
    let mut output = |stream, plan: &Output, logged: Option<OwnedFd>, roles: [FdRole; 2]| {
        if let Some(pipe) = logged {
            open::give(&pipe, owner).map_err(failed)?;
            return Ok(pipe);
        }
        let [client_role, pipe_role] = roles;
        let client = match fds.get(client_role) {
            Some(client) => client,
            None => match open::output(stream, plan)? {
                Some(client) => Arc::new(client),
                None => return open::null(stream),
            },
        };
        let pipe = open::output_pipe(of == Of::Init).map_err(failed)?;
        open::give(&pipe.theirs, owner).map_err(failed)?;
        set.push((client_role, client));
        set.push((pipe_role, Arc::new(pipe.ours)));
        Ok(pipe.theirs)
    };
    let stdout = output(
        "stdout",
        &plan.stdout,
        logged_stdout,
        [FdRole::StdoutClient, FdRole::StdoutPipe],
    )?;
    let stderr = output(
        "stderr",
        &plan.stderr,
        logged_stderr,
        [FdRole::StderrClient, FdRole::StderrPipe],
    )?;
    let stdin = match &plan.stdin {
        None => open::null("stdin")?,
        Some(path) => {
            let client = match fds.get(FdRole::StdinClient) {
                Some(client) => client,
                None => Arc::new(open::input(path)?),
            };
            let Pipe { ours, theirs } = open::input_pipe().map_err(failed)?;
            open::give(&theirs, owner).map_err(failed)?;
            set.push((FdRole::StdinClient, client));
            set.push((FdRole::StdinPipe, Arc::new(ours)));
            theirs
        }
    };
    fds.keep(set)
        .map_err(|source| StdioError::NotKept { source })?;
    Ok(ChildStdio {
        stdin,
        stdout,
        stderr,
    })
}

/// The same for a terminal, which the runtime makes: there is no end for the process yet.
pub(crate) fn prepare_terminal(
    plan: &Plan,
    logger: Option<LoggerPipes>,
    fds: &ProcessFds,
) -> Result<(), StdioError> {
    let failed = |source| StdioError::Pipe { source };
    let mut set = Vec::new();
    if let Some(path) = &plan.stdin
        && fds.get(FdRole::StdinClient).is_none()
    {
        set.push((FdRole::StdinClient, Arc::new(open::held_input(path)?)));
    }
    let client = match (logger, fds.get(FdRole::StdoutClient)) {
        // A terminal has no error output of its own: that pipe is closed here.
        (Some(pipes), _) => {
            open::set_non_blocking(&pipes.stdout).map_err(failed)?;
            Some(Arc::new(pipes.stdout))
        }
        (None, Some(left)) => Some(left),
        (None, None) => open::output("stdout", &plan.stdout)?.map(Arc::new),
    };
    if let Some(client) = client {
        if !open::is_pipe(&client) {
            // What is read from a terminal and not yet in the file has to be where a successor finds it.
            let pipe = open::output_pipe(true).map_err(failed)?;
            open::set_non_blocking(&pipe.theirs).map_err(failed)?;
            set.push((FdRole::StdoutPipe, Arc::new(pipe.theirs)));
        }
        set.push((FdRole::StdoutClient, client));
    }
    fds.keep(set)
        .map_err(|source| StdioError::NotKept { source })
}

/// The call of the runtime has failed, or was cut short: what is in the pipes are the runtime's own words. The client's ends stay, for
/// another attempt.
pub(crate) fn discard_pipes(fds: &ProcessFds) {
    fds.forget(&PIPES);
}

/// Takes over the client's ends of an attempt that was cut short.
pub(crate) fn adopt_client_ends(fds: &ProcessFds, of: &ProcessFds) -> io::Result<()> {
    fds.adopt(of, &CLIENT_ENDS)
}

/// The streams of a process that runs or has run: what flows between the ends in its set. Dropping them ends the flowing, and closes
/// nothing.
#[derive(Debug)]
pub(crate) struct Streams {
    fds: ProcessFds,
    label: Arc<str>,
    outputs: Vec<Flow>,
    input: Mutex<Option<Flow>>,
}

impl Streams {
    /// Lets the outputs flow; the input waits for [`begin_input`](Self::begin_input). Needs a tokio runtime. `id` is for the log.
    pub(crate) fn start(fds: &ProcessFds, of: Of, id: &str) -> Self {
        let label: Arc<str> = id.into();
        let has = |role| fds.get(role).is_some();
        let start = |stream, source, sink, patience, at_end| {
            let label = Label {
                id: Arc::clone(&label),
                stream,
            };
            let course = Course {
                source,
                sink,
                patience,
                at_end,
                label,
            };
            Flow::start(course, fds.clone())
        };
        let at_end = match of {
            Of::Init => AtEnd::KeepUnread,
            Of::Exec => AtEnd::Close,
        };
        let mut outputs = Vec::new();
        if has(FdRole::Terminal) && has(FdRole::StdoutPipe) {
            // To a file: by way of a pipe that is stored.
            let (pipe, silence) = (FdRole::StdoutPipe, Some(SILENCE));
            let terminal = start(
                "stdout",
                FdRole::Terminal,
                Some(pipe),
                silence,
                AtEnd::Leave,
            );
            let sink = Some(FdRole::StdoutClient);
            let file = start("stdout", pipe, sink, Some(Duration::ZERO), AtEnd::Close);
            outputs.extend([terminal, file]);
        } else if has(FdRole::Terminal) {
            let sink = has(FdRole::StdoutClient).then_some(FdRole::StdoutClient);
            outputs.push(start(
                "stdout",
                FdRole::Terminal,
                sink,
                Some(SILENCE),
                at_end,
            ));
        } else {
            let patience = (of == Of::Init).then_some(HOLDERS);
            for (stream, source, sink) in [
                ("stdout", FdRole::StdoutPipe, FdRole::StdoutClient),
                ("stderr", FdRole::StderrPipe, FdRole::StderrClient),
            ] {
                let (Some(pipe), Some(client)) = (fds.get(source), fds.get(sink)) else {
                    continue;
                };
                if open::is_reader(&client) {
                    // It is over, and what is unread waits for the client.
                    continue;
                }
                // What came from a terminal that is gone has no end of its own.
                let staged = open::is_held(&pipe).then_some(Duration::ZERO);
                outputs.push(start(
                    stream,
                    source,
                    Some(sink),
                    staged.or(patience),
                    at_end,
                ));
            }
        }
        Self {
            fds: fds.clone(),
            label,
            outputs,
            input: Mutex::default(),
        }
    }

    /// Whether there is anything to be moved, or to be kept for a client.
    pub(crate) fn has_any(fds: &ProcessFds) -> bool {
        PIPES
            .iter()
            .chain(&CLIENT_ENDS)
            .any(|role| fds.get(*role).is_some())
    }

    /// Lets the input flow. Unless it `is_closed`, it outlives its client from now on. Idempotent.
    pub(crate) fn begin_input(&self, is_closed: bool) {
        let Some(client) = self.fds.get(FdRole::StdinClient) else {
            return;
        };
        if !is_closed && !open::is_held(&client) {
            match open::reopen(&*client, libc::O_RDWR | libc::O_NONBLOCK) {
                Ok(held) => {
                    let kept = (FdRole::StdinClient, Arc::new(held));
                    self.fds.exchange(Some(kept), &[FdRole::StdinClient]);
                }
                Err(error) => {
                    warn!(id = %self.label, %error, "the input cannot be kept open: it ends with its client");
                }
            }
        }
        drop(client);
        let sink = if self.fds.get(FdRole::StdinPipe).is_some() {
            FdRole::StdinPipe
        } else {
            FdRole::Terminal
        };
        let mut input = self.input();
        if input.is_none() {
            let course = Course {
                source: FdRole::StdinClient,
                sink: Some(sink),
                patience: None,
                at_end: if sink == FdRole::Terminal {
                    AtEnd::Leave
                } else {
                    AtEnd::Close
                },
                label: Label {
                    id: Arc::clone(&self.label),
                    stream: "stdin",
                },
            };
            *input = Some(Flow::start(course, self.fds.clone()));
        }
    }

    /// Gives up our writer of the input: it ends with what is in it once the client's writers are gone too. Idempotent.
    pub(crate) fn close_stdin(&self) {
        let Some(client) = self.fds.get(FdRole::StdinClient) else {
            return;
        };
        if open::is_held(&client) {
            let reader = open::reopen(&*client, libc::O_RDONLY | libc::O_NONBLOCK).ok();
            let kept = reader.map(|reader| (FdRole::StdinClient, Arc::new(reader)));
            self.fds.exchange(kept, &[FdRole::StdinClient]);
        }
        drop(client);
        if let Some(input) = &*self.input() {
            input.kick();
        }
    }

    /// The process has ended: its input is closed, and its outputs end with what is in them.
    pub(crate) fn end_of_process(&self) {
        *self.input() = None;
        self.fds.forget(&[FdRole::StdinClient, FdRole::StdinPipe]);
        let staged = self.fds.get(FdRole::Terminal).is_some() && self.outputs.len() == 2;
        match self.outputs.as_slice() {
            [terminal, file] if staged => {
                terminal.process_ended();
                file.end_after(terminal);
            }
            outputs => outputs.iter().for_each(Flow::process_ended),
        }
    }

    /// Waits until all output is with the client, for at most `limit`.
    pub(crate) async fn drained(&self, limit: Duration) {
        let all = async {
            for output in &self.outputs {
                output.done().await;
            }
        };
        let _ = tokio::time::timeout(limit, all).await;
    }

    /// Sets the size of the terminal, in characters; without a terminal there is nothing to do.
    pub(crate) fn resize(&self, width: u16, height: u16) -> Result<(), StdioError> {
        let Some(master) = self.fds.get(FdRole::Terminal) else {
            return Ok(());
        };
        sys::set_window_size(master.as_fd(), width, height).map_err(|source| StdioError::Console {
            doing: "resize a terminal",
            source,
        })
    }

    fn input(&self) -> MutexGuard<'_, Option<Flow>> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the client has come, written and gone already, right before the process may read: then its input ends with what is in it.
///
/// `ctr run` sends `CloseIO` at the end of its own input, but not if that comes before `NewTask` has returned, as with
/// `echo hi | ctr run ... cat`; a writer of ours would then keep the container waiting. The writer of a daemon that died right after
/// opening it looks like a client that has gone, so this is asked once.
pub(crate) fn client_has_gone(fds: &ProcessFds) -> bool {
    fds.get(FdRole::StdinClient)
        .is_some_and(|client| !open::is_held(&client) && has_hung_up(&client))
}

/// Whether the fifo had a writer since this reader was opened, and has none now (`pipe_poll` in the kernel).
fn has_hung_up(reader: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(reader.as_fd(), PollFlags::empty())];
    let polled = poll(&mut fds, PollTimeout::ZERO);
    let [fd] = fds;
    polled.is_ok()
        && fd
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLHUP))
}

/// Which pipes the set has, for the process's record.
pub(crate) fn pipe_inodes(fds: &ProcessFds) -> PipeInodes {
    let inode = |role| fstat(&*fds.get(role)?).ok().map(|stat| stat.st_ino);
    if fds.get(FdRole::Terminal).is_some() {
        return PipeInodes::default();
    }
    PipeInodes {
        stdin: inode(FdRole::StdinPipe),
        stdout: inode(FdRole::StdoutPipe),
        stderr: inode(FdRole::StderrPipe),
    }
}

/// Nothing is stored any more, since store and daemon ended together: finds the pipes of a living process among its descriptors, opens
/// the client's ends again by their paths, and stores all of it. Blocks on procfs and on the file system.
pub(crate) fn find_again(
    plan: &Plan,
    pipes: PipeInodes,
    process: ProcessIdentity,
    is_stdin_closed: bool,
    fds: &ProcessFds,
) -> Result<(), StdioError> {
    let mut set = Vec::new();
    for (stream, inode, output, roles) in [
        (
            "stdout",
            pipes.stdout,
            &plan.stdout,
            [FdRole::StdoutClient, FdRole::StdoutPipe],
        ),
        (
            "stderr",
            pipes.stderr,
            &plan.stderr,
            [FdRole::StderrClient, FdRole::StderrPipe],
        ),
    ] {
        let flags = libc::O_RDONLY | libc::O_NONBLOCK;
        if let Some(pipe) = inode.and_then(|inode| open::pipe_of(process.pid, inode, flags))
            && let Some(client) = open::output(stream, output)?
        {
            set.extend(roles.into_iter().zip([client, pipe]));
        }
    }
    let flags = libc::O_WRONLY | libc::O_NONBLOCK;
    if let (Some(path), Some(inode)) = (&plan.stdin, pipes.stdin)
        && !is_stdin_closed
        && let Some(pipe) = open::pipe_of(process.pid, inode, flags)
    {
        set.push((FdRole::StdinClient, open::held_input(path)?));
        set.push((FdRole::StdinPipe, pipe));
    }
    let set = set.into_iter().map(|(role, fd)| (role, Arc::new(fd)));
    fds.keep(set)
        .map_err(|source| StdioError::NotKept { source })
}

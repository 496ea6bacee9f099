//! Both ends of a process's streams: [`prepare`] makes them before the runtime is called, [`Streams`] lets bytes flow between them
//! afterwards. Owns which ends there are, and that both are stored before anything can flow; never interprets what flows.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::flow::{AtEnd, Course, Flow, TERMINAL};
use super::open::{self, Pipe};
use super::plan::{Output, Plan};
use super::pump::{Label, Way};
use super::{LoggerPipes, StdioError};
use crate::fdstore::{FdRole, ProcessFds, StreamFd};
use crate::process::ProcessIdentity;
use crate::sys;

/// An init's output that somebody outside of its container still has open is over when nothing has come for this long.
const HOLDERS: Duration = Duration::from_secs(2);
/// The same for a terminal: long enough for the kernel's own buffering, which goes through a work queue.
const SILENCE: Duration = Duration::from_millis(200);

const CLIENT_ENDS: [FdRole; 5] = [
    FdRole::StdinNew,
    FdRole::StdinHeld,
    FdRole::StdinLast,
    FdRole::StdoutClient,
    FdRole::StderrClient,
];
const STDOUT: &[FdRole] = &[FdRole::StdoutPipe];
const STDERR: &[FdRole] = &[FdRole::StderrPipe];
const INPUT: &[FdRole] = &[FdRole::StdinNew, FdRole::StdinHeld, FdRole::StdinLast];
const PIPES: [FdRole; 8] = [
    FdRole::StdinPipe,
    FdRole::StdoutPipe,
    FdRole::StderrPipe,
    FdRole::StdinStage,
    FdRole::StdoutStage,
    FdRole::StderrStage,
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

/// Makes new pipes and opens the client's ends, but for those that an earlier attempt has left in the set, and stores all of it. Blocks on
/// the file system, never on a missing peer. `owner` is the owner of the pipes. `logger` are the pipes of the logger, if there is one.
///
/// The client's ends come last, each stored as soon as it is open: a client whose opening has waited for ours would read the end if this
/// daemon died in between.
pub(crate) fn prepare(
    plan: &Plan,
    of: Of,
    owner: Option<(u32, u32)>,
    logger: Option<LoggerPipes>,
    fds: &ProcessFds,
) -> Result<ChildStdio, StdioError> {
    let failed = |source| StdioError::Pipe { source };
    let (logged_stdout, logged_stderr) = logger.map(|pipes| (pipes.stdout, pipes.stderr)).unzip();
    let mut pipes = Vec::new();
    let mut output =
        |stream, plan: &Output, logged: Option<OwnedFd>, [pipe_role, stage_role]: [FdRole; 2]| {
            let theirs = match (logged, plan) {
                (Some(pipe), _) => pipe,
                (None, Output::Null | Output::Logger(_)) => return open::null(stream),
                (None, Output::Path(_) | Output::File(_)) => {
                    let pipe = open::output_pipe(of == Of::Init).map_err(failed)?;
                    pipes.push((pipe_role, StreamFd::new(pipe.ours)));
                    pipes.push((stage_role, StreamFd::new(open::stage().map_err(failed)?)));
                    pipe.theirs
                }
            };
            open::give(&theirs, owner).map_err(failed)?;
            Ok(theirs)
        };
    let stdout = output(
        "stdout",
        &plan.stdout,
        logged_stdout,
        [FdRole::StdoutPipe, FdRole::StdoutStage],
    )?;
    let stderr = output(
        "stderr",
        &plan.stderr,
        logged_stderr,
        [FdRole::StderrPipe, FdRole::StderrStage],
    )?;
    let stdin = if plan.stdin.is_some() {
        let Pipe { ours, theirs } = open::input_pipe().map_err(failed)?;
        open::give(&theirs, owner).map_err(failed)?;
        pipes.push((FdRole::StdinPipe, StreamFd::new(ours)));
        pipes.push((
            FdRole::StdinStage,
            StreamFd::new(open::stage().map_err(failed)?),
        ));
        theirs
    } else {
        open::null("stdin")?
    };
    fds.keep(pipes).map_err(not_kept)?;
    open_output(fds, FdRole::StdoutClient, "stdout", &plan.stdout)?;
    open_output(fds, FdRole::StderrClient, "stderr", &plan.stderr)?;
    if let Some(path) = &plan.stdin
        && fds.first(INPUT).is_none()
    {
        fds.keep_at_once(FdRole::StdinNew, open::input(path)?)
            .map_err(not_kept)?;
    }
    Ok(ChildStdio {
        stdin,
        stdout,
        stderr,
    })
}

/// Opens and stores the client's end of an output, unless it is there or there is none.
fn open_output(
    fds: &ProcessFds,
    role: FdRole,
    stream: &'static str,
    plan: &Output,
) -> Result<(), StdioError> {
    if fds.get(role).is_none()
        && let Some(client) = open::output(stream, plan)?
    {
        fds.keep_at_once(role, client).map_err(not_kept)?;
    }
    Ok(())
}

fn not_kept(source: io::Error) -> StdioError {
    StdioError::NotKept { source }
}

/// The same for a terminal, which the runtime makes: there is no end for the process yet.
pub(crate) fn prepare_terminal(
    plan: &Plan,
    logger: Option<LoggerPipes>,
    fds: &ProcessFds,
) -> Result<(), StdioError> {
    let failed = |source| StdioError::Pipe { source };
    let stages = [FdRole::StdinStage, FdRole::StdoutStage].map(|role| {
        let stage = open::stage().map_err(failed)?;
        Ok((role, StreamFd::new(stage)))
    });
    let stages = stages.into_iter().collect::<Result<Vec<_>, StdioError>>()?;
    fds.keep(stages).map_err(not_kept)?;
    match logger {
        // A terminal has no error output of its own: that pipe is closed here.
        Some(pipes) => {
            open::set_non_blocking(&pipes.stdout).map_err(failed)?;
            fds.keep([(FdRole::StdoutClient, StreamFd::new(pipes.stdout))])
                .map_err(not_kept)?;
        }
        None => open_output(fds, FdRole::StdoutClient, "stdout", &plan.stdout)?,
    }
    if let Some(path) = &plan.stdin
        && fds.first(INPUT).is_none()
    {
        fds.keep_at_once(FdRole::StdinHeld, open::held_input(path)?)
            .map_err(not_kept)?;
    }
    Ok(())
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
    input: Arc<Mutex<Input>>,
}

/// What is to become of the input, and its flow once it may flow.
#[derive(Debug, Default)]
struct Input {
    is_closed: bool,
    has_ended: bool,
    flow: Option<Flow>,
}

impl Streams {
    /// Lets the outputs flow; the input waits for [`begin_input`](Self::begin_input). Needs a tokio runtime. `id` is for the log.
    pub(crate) fn start(fds: &ProcessFds, of: Of, id: &str) -> Self {
        let label: Arc<str> = id.into();
        let mut outputs = Vec::new();
        for (stream, way, patience) in ways(fds, of) {
            let course = Course {
                way,
                patience,
                at_end: match of {
                    Of::Init => AtEnd::KeepUnread,
                    Of::Exec => AtEnd::Close,
                },
                label: Label {
                    id: Arc::clone(&label),
                    stream,
                },
            };
            outputs.push(Flow::start(course, fds.clone()));
        }
        Self {
            fds: fds.clone(),
            label,
            outputs,
            input: Arc::default(),
        }
    }

    /// Whether there is anything to be moved, or to be kept for a client.
    pub(crate) fn has_any(fds: &ProcessFds) -> bool {
        PIPES
            .iter()
            .chain(&CLIENT_ENDS)
            .any(|role| fds.get(*role).is_some())
    }

    /// Lets the input flow. Unless it `is_closed`, it outlives its client from now on. Idempotent. What it takes is done in a thread of
    /// its own, since opening a fifo again waits for its lock.
    pub(crate) fn begin_input(&self, is_closed: bool) {
        if self.fds.first(INPUT).is_none() {
            return;
        }
        let (fds, label, input) = (
            self.fds.clone(),
            Arc::clone(&self.label),
            Arc::clone(&self.input),
        );
        drop(tokio::task::spawn_blocking(move || {
            let mut input = lock(&input);
            input.is_closed |= is_closed;
            if input.has_ended {
                return;
            }
            settle_input(&fds, input.is_closed, &label);
            if input.flow.is_none() {
                input.flow = Some(Flow::start(input_course(&fds, label), fds));
            }
        }));
    }

    /// Gives up our writer of the input: it ends with what is in it once the client's writers are gone too. Idempotent.
    pub(crate) fn close_stdin(&self) {
        if self.fds.first(INPUT).is_none() {
            return;
        }
        let (fds, label, input) = (
            self.fds.clone(),
            Arc::clone(&self.label),
            Arc::clone(&self.input),
        );
        drop(tokio::task::spawn_blocking(move || {
            let mut input = lock(&input);
            input.is_closed = true;
            settle_input(&fds, true, &label);
            if let Some(flow) = &input.flow {
                flow.kick();
            }
        }));
    }

    /// The process has ended: its input is closed, and its outputs end with what is in them.
    pub(crate) fn end_of_process(&self) {
        let ended = lock_if_free(&self.input).map(|mut input| {
            input.has_ended = true;
            input.flow = None;
        });
        if ended.is_none() {
            // Its input is just being opened again, in a thread that may wait.
            let input = Arc::clone(&self.input);
            drop(tokio::task::spawn_blocking(move || {
                let mut input = lock(&input);
                input.has_ended = true;
                input.flow = None;
            }));
        }
        self.fds.forget(INPUT);
        self.fds.forget(&[FdRole::StdinPipe, FdRole::StdinStage]);
        self.outputs.iter().for_each(Flow::process_ended);
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
}

fn lock(input: &Mutex<Input>) -> MutexGuard<'_, Input> {
    input.lock().unwrap_or_else(PoisonError::into_inner)
}

fn lock_if_free(input: &Mutex<Input>) -> Option<MutexGuard<'_, Input>> {
    match input.try_lock() {
        Ok(input) => Some(input),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// The outputs that are to flow: each stream, what it goes through, and how long its end is waited for after its process's.
fn ways(fds: &ProcessFds, of: Of) -> Vec<(&'static str, Way, Option<Duration>)> {
    let has = |role| fds.get(role).is_some();
    if has(FdRole::Terminal) {
        let sink = has(FdRole::StdoutClient).then_some(FdRole::StdoutClient);
        let way = Way {
            source: TERMINAL,
            stage: sink.map(|_| FdRole::StdoutStage),
            sink,
        };
        return vec![("stdout", way, Some(SILENCE))];
    }
    let patience = (of == Of::Init).then_some(HOLDERS);
    let outputs = [
        ("stdout", STDOUT, FdRole::StdoutStage, FdRole::StdoutClient),
        ("stderr", STDERR, FdRole::StderrStage, FdRole::StderrClient),
    ];
    let way = |(stream, source, stage, sink): (&'static str, &'static [FdRole], FdRole, FdRole)| {
        let client = fds.get(sink)?;
        // One that is open for reading alone is over, and what is unread waits for the client.
        let is_there = fds.first(source).is_some() && !open::is_reader(&client);
        let way = Way {
            source,
            stage: open::takes_splice(&client).then_some(stage),
            sink: Some(sink),
        };
        is_there.then_some((stream, way, patience))
    };
    outputs.into_iter().filter_map(way).collect()
}

fn input_course(fds: &ProcessFds, id: Arc<str>) -> Course {
    let (sink, at_end) = if fds.get(FdRole::StdinPipe).is_some() {
        (FdRole::StdinPipe, AtEnd::Close)
    } else {
        (FdRole::Terminal, AtEnd::Leave)
    };
    Course {
        way: Way {
            source: INPUT,
            stage: Some(FdRole::StdinStage),
            sink: Some(sink),
        },
        patience: None,
        at_end,
        label: Label {
            id,
            stream: "stdin",
        },
    }
}

/// Brings the client's end of an input to where it belongs: open for writing too, or for reading alone. The role comes first, since it is
/// what a successor goes by. Blocks on the fifo's lock.
fn settle_input(fds: &ProcessFds, is_closed: bool, id: &str) {
    decide_input(fds);
    let Some((role, client)) = fds.first(INPUT) else {
        return;
    };
    let wanted = if is_closed || role == FdRole::StdinLast {
        FdRole::StdinLast
    } else {
        FdRole::StdinHeld
    };
    if role != wanted {
        fds.exchange(Some((wanted, client.clone())), &[role]);
    }
    let (is_right, flags) = match wanted {
        FdRole::StdinLast => (!open::is_held(&client), libc::O_RDONLY),
        _ => (open::is_held(&client), libc::O_RDWR),
    };
    if is_right {
        return;
    }
    match open::reopen(&client, flags | libc::O_NONBLOCK) {
        Ok(again) => {
            drop(client);
            fds.exchange(Some((wanted, StreamFd::new(again))), &[wanted]);
        }
        Err(error) => {
            warn!(%id, %error, "an input cannot be opened again: it ends with its client");
        }
    }
}

/// Decides, once, whether an input outlives its client, right before its process may read: not if the client has come, written and gone
/// already. Then the input ends with what is in it.
///
/// `ctr run` sends `CloseIO` at the end of its own input, but not if that comes before `NewTask` has returned, as with
/// `echo hi | ctr run ... cat`; a writer of ours would then keep the container waiting. The writer of a daemon that died right after
/// opening it looks like a client that has gone: so the decision is in the set before ours is opened.
pub(crate) fn decide_input(fds: &ProcessFds) {
    if let Some(client) = fds.get(FdRole::StdinNew) {
        let decided = if has_hung_up(&client) {
            FdRole::StdinLast
        } else {
            FdRole::StdinHeld
        };
        fds.exchange(Some((decided, client)), &[FdRole::StdinNew]);
    }
}

/// Whether the fifo had a writer since this reader was opened, and has none now (`pipe_poll` in the kernel).
fn has_hung_up(reader: &StreamFd) -> bool {
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
    let inode = |role| fstat(fds.get(role)?).ok().map(|stat| stat.st_ino);
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
/// the client's ends again by their paths, and stores all of it. What is not there of one stream costs the others nothing. Blocks on
/// procfs and on the file system.
pub(crate) fn find_again(
    plan: &Plan,
    pipes: PipeInodes,
    process: ProcessIdentity,
    is_stdin_closed: bool,
    fds: &ProcessFds,
) -> Result<(), StdioError> {
    let output = |stream, inode: Option<u64>, output: &Output, roles: [FdRole; 3]| {
        let flags = libc::O_RDONLY | libc::O_NONBLOCK;
        let Some(pipe) = inode.and_then(|inode| open::pipe_of(process.pid, inode, flags)) else {
            return Ok(());
        };
        let Some(client) = open::output(stream, output)? else {
            return Ok(());
        };
        take_again(fds, roles, [client, pipe])
    };
    let stdout = [
        FdRole::StdoutClient,
        FdRole::StdoutPipe,
        FdRole::StdoutStage,
    ];
    let stderr = [
        FdRole::StderrClient,
        FdRole::StderrPipe,
        FdRole::StderrStage,
    ];
    let stdin = || {
        let flags = libc::O_WRONLY | libc::O_NONBLOCK;
        if let (Some(path), Some(inode)) = (&plan.stdin, pipes.stdin)
            && !is_stdin_closed
            && let Some(pipe) = open::pipe_of(process.pid, inode, flags)
        {
            let client = open::held_input(path)?;
            let roles = [FdRole::StdinHeld, FdRole::StdinPipe, FdRole::StdinStage];
            take_again(fds, roles, [client, pipe])?;
        }
        Ok(())
    };
    let results = [
        output("stdout", pipes.stdout, &plan.stdout, stdout),
        output("stderr", pipes.stderr, &plan.stderr, stderr),
        stdin(),
    ];
    results.into_iter().collect()
}

fn take_again(fds: &ProcessFds, roles: [FdRole; 3], ends: [OwnedFd; 2]) -> Result<(), StdioError> {
    let [client, pipe] = ends;
    let stage = open::stage().map_err(|source| StdioError::Pipe { source })?;
    let set = roles
        .into_iter()
        .zip([client, pipe, stage].map(StreamFd::new));
    fds.keep(set).map_err(not_kept)
}

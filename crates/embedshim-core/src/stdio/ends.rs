//! [`Streams`]: what flows between the ends of a process's streams, from its start to its end. Owns
//! which way each stream goes, when an output is over, and whether the input outlives its client;
//! the ends themselves are [`super::prepare`]'s.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::warn;

use super::StdioError;
use super::append::Label;
use super::flow::{Flow, Meter};
use super::flow_state::{AtEnd, FlowPath, TERMINAL};
use super::idle::Idle;
use super::open;
use super::prepare::{CLIENT_ENDS, INPUT, Of, PIPES};
use super::pump::Way;
use super::taken::{is_taken, wait_until_taken};
use crate::clock::BootTime;
use crate::fdstore::{FdRole, ProcessFds, StreamFd};
use crate::sys;

const STDOUT: &[FdRole] = &[FdRole::StdoutPipe];
const STDERR: &[FdRole] = &[FdRole::StderrPipe];
/// An init's output that a process outside of its container still has open is over when nothing has
/// come for this long.
const HOLDERS: Duration = Duration::from_secs(2);
/// The same for a terminal: long enough for the kernel's own buffering, which goes through a work
/// queue.
const SILENCE: Duration = Duration::from_millis(200);

/// The streams of a process that runs or has run: what flows between the ends in its set. Dropping
/// them ends the flowing, and closes nothing.
#[derive(Debug)]
pub(crate) struct Streams {
    fds: ProcessFds,
    label: Arc<str>,
    outputs: Vec<Flow>,
    input: Arc<Mutex<Input>>,
    idle: Idle,
}

/// What is to become of the input, and its flow once it may flow.
#[derive(Debug, Default)]
struct Input {
    is_closed: bool,
    has_ended: bool,
    flow: Option<Flow>,
}

impl Streams {
    /// Lets the outputs flow; the input waits for [`begin_input`](Self::begin_input). Needs a tokio
    /// runtime. `idle` is where they rest, `id` is for the log.
    pub(crate) fn start(fds: &ProcessFds, of: Of, idle: &Idle, id: &str) -> Self {
        let label: Arc<str> = id.into();
        let ways = ways(fds, of);
        let mut outputs = Vec::with_capacity(ways.len());
        for (stream, way, patience) in ways {
            let path = FlowPath {
                way,
                patience,
                at_end: match of {
                    Of::Init => AtEnd::KeepUnread,
                    Of::Exec => AtEnd::KeepUntilPublished,
                },
                label: Label {
                    id: Arc::clone(&label),
                    stream,
                },
            };
            outputs.push(Flow::start(path, fds.clone(), idle));
        }
        Self {
            idle: idle.clone(),
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

    /// Lets the input flow. Unless it `is_closed`, it outlives its client from now on. Idempotent.
    /// What it takes is done in a thread of its own, since opening a fifo again waits for its lock.
    pub(crate) fn begin_input(&self, is_closed: bool) {
        if self.fds.first(INPUT).is_none() {
            return;
        }
        let (fds, label, input) = (
            self.fds.clone(),
            Arc::clone(&self.label),
            Arc::clone(&self.input),
        );
        let idle = self.idle.clone();
        drop(tokio::task::spawn_blocking(move || {
            let mut input = lock(&input);
            input.is_closed |= is_closed;
            if input.has_ended {
                return;
            }
            settle_input(&fds, input.is_closed, &label);
            if input.flow.is_none() {
                input.flow = Some(Flow::start(input_path(&fds, label), fds, &idle));
            }
        }));
    }

    /// Gives up our writer of the input: it ends with what is in it once the client's writers are
    /// gone too. Idempotent.
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
        self.fds.remove(INPUT);
        self.fds.remove(&[FdRole::StdinPipe, FdRole::StdinStage]);
        self.outputs.iter().for_each(Flow::process_ended);
    }

    /// Waits until the client has read what the process has written, or does not read. To be called
    /// between its end and the telling of it.
    pub(crate) async fn taken(&self) {
        let outputs: Vec<Meter> = self.outputs.iter().map(Flow::meter).collect();
        if is_taken(&self.fds, &outputs) {
            return;
        }
        let fds = self.fds.clone();
        let wait = move || wait_until_taken(&fds, &outputs);
        if let Err(error) = tokio::task::spawn_blocking(wait).await {
            warn!(id = %self.label, %error, "cannot wait for a client to read: an exit is published without it");
        }
    }

    /// The exit is published: what is unread of an exec's outputs is not kept.
    pub(crate) fn exit_is_published(&self) {
        for output in &self.outputs {
            output.exit_is_published(&self.fds);
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

    /// The streams that have bytes whose other end takes none of them, each with the time since
    /// when. Of an input whose client's end is just being opened nothing is known.
    pub(crate) fn blocked(&self) -> Vec<(&'static str, BootTime)> {
        let blocked = |flow: &Flow| Some((flow.stream, flow.blocked_since()?));
        let input = lock_if_free(&self.input);
        let input = input.as_ref().and_then(|input| input.flow.as_ref());
        let outputs = self.outputs.iter();
        input
            .into_iter()
            .chain(outputs)
            .filter_map(blocked)
            .collect()
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

/// The outputs that are to flow: each stream, what it goes through, and how long its end is waited
/// for after its process's.
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

fn input_path(fds: &ProcessFds, id: Arc<str>) -> FlowPath {
    let (sink, at_end) = if fds.get(FdRole::StdinPipe).is_some() {
        (FdRole::StdinPipe, AtEnd::Close)
    } else {
        (FdRole::Terminal, AtEnd::Leave)
    };
    FlowPath {
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

/// Brings the client's end of an input to where it belongs: open for writing too, or for reading
/// alone. The role comes first, since it is what a successor goes by. Blocks on the fifo's lock.
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
            warn!(%id, %error, "cannot open an input again: it ends with its client");
        }
    }
}

/// Decides, once, whether an input outlives its client, right before its process may read: not if
/// the client has come, written and gone already. Then the input ends with what is in it.
///
/// `ctr run` sends `CloseIO` at the end of its own input, but not if that comes before `NewTask`
/// has returned, as with `echo hi | ctr run ... cat`; the daemon's writer would then keep the
/// container waiting. The writer of a daemon that died right after opening it looks like a client
/// that has gone: so the decision is in the set before the daemon's is opened.
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

/// Whether the fifo had a writer since this reader was opened, and has none now (`pipe_poll` in the
/// kernel).
fn has_hung_up(reader: &StreamFd) -> bool {
    let mut fds = [PollFd::new(reader.as_fd(), PollFlags::empty())];
    let polled = poll(&mut fds, PollTimeout::ZERO);
    let [fd] = fds;
    polled.is_ok()
        && fd
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLHUP))
}

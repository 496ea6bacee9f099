//! Making the ends of a process's streams before the runtime is called ([`prepare`]), keeping what
//! another attempt needs of them, and finding them again when nothing but the process has them
//! ([`find_again`]). Owns which ends there are; what flows is [`super::ends`]'s.

use std::io;
use std::os::fd::OwnedFd;

use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};

use super::non_blocking::set_non_blocking;
use super::open::{self, Pipe};
use super::plan::{Output, Plan};
use super::{LoggerPipes, StdioError};
use crate::fdstore::{FdRole, ProcessFds, StreamFd};
use crate::process::ProcessIdentity;

pub(super) const CLIENT_ENDS: [FdRole; 5] = [
    FdRole::StdinNew,
    FdRole::StdinHeld,
    FdRole::StdinLast,
    FdRole::StdoutClient,
    FdRole::StderrClient,
];
pub(super) const PIPES: [FdRole; 9] = [
    FdRole::StdinPipe,
    FdRole::StdoutPipe,
    FdRole::StderrPipe,
    FdRole::StdinStage,
    FdRole::StdoutStage,
    FdRole::StderrStage,
    FdRole::Terminal,
    FdRole::Console,
    FdRole::ConsoleConnection,
];
/// The client's end of the input, in any of its states.
pub(super) const INPUT: &[FdRole] = &[FdRole::StdinNew, FdRole::StdinHeld, FdRole::StdinLast];

/// The streams for the process. The daemon closes them right after: a writer of its own would
/// hide the end.
#[derive(Debug)]
pub(crate) struct ChildStdio {
    /// Its input.
    pub(crate) stdin: OwnedFd,
    /// Its output.
    pub(crate) stdout: OwnedFd,
    /// Its error output.
    pub(crate) stderr: OwnedFd,
}

/// Which pipes a process has, by inode: how they are found again if nothing but the process has
/// them any more.
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

    /// Whether this process has one of them open. Blocks on procfs.
    pub(crate) fn are_open_in(self, pid: i32) -> bool {
        let pipes = [self.stdin, self.stdout, self.stderr];
        let mut inodes = pipes.into_iter().flatten();
        inodes.any(|inode| open::link_to_pipe(pid, inode).is_some())
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

/// Makes new pipes and opens the client's ends, but for those that an earlier attempt has left in
/// the set, and stores all of it. Blocks on the file system, never on a missing peer. `owner` is
/// the owner of the pipes. `logger` are the pipes of the logger, if there is one.
///
/// The client's ends come last, each stored as soon as it is open: a client whose opening has
/// waited for the daemon's would read the end if this daemon died in between.
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
    fds.insert(pipes).map_err(not_stored)?;
    open_output(fds, FdRole::StdoutClient, "stdout", &plan.stdout)?;
    open_output(fds, FdRole::StderrClient, "stderr", &plan.stderr)?;
    if let Some(path) = &plan.stdin
        && fds.first(INPUT).is_none()
    {
        open::input_into(fds, FdRole::StdinNew, path, false)?;
    }
    Ok(ChildStdio {
        stdin,
        stdout,
        stderr,
    })
}

/// Whether both ends of all streams that [`prepare`] or [`prepare_terminal`] makes for this plan
/// are in the set. A logger's pipes are its own.
pub(crate) fn are_kept(plan: &Plan, fds: &ProcessFds) -> bool {
    let has = |role| fds.get(role).is_some();
    let is_terminal = plan.terminal();
    let output = |plan: &Output, pipe, client| match plan {
        Output::Null | Output::Logger(_) => true,
        Output::Path(_) | Output::File(_) => has(client) && (is_terminal || has(pipe)),
    };
    let input = plan.stdin.is_none()
        || (fds.first(INPUT).is_some() && (is_terminal || has(FdRole::StdinPipe)));
    let has_terminal = !is_terminal || has(FdRole::Console) || has(FdRole::Terminal);
    let stderr = || output(&plan.stderr, FdRole::StderrPipe, FdRole::StderrClient);
    input
        && has_terminal
        && output(&plan.stdout, FdRole::StdoutPipe, FdRole::StdoutClient)
        && (is_terminal || stderr())
}

/// Whether the terminal of a process is in its set.
pub(crate) fn has_terminal(fds: &ProcessFds) -> bool {
    fds.get(FdRole::Terminal).is_some()
}

/// Opens and stores the client's end of an output, unless it is there or there is none.
fn open_output(
    fds: &ProcessFds,
    role: FdRole,
    stream: &'static str,
    plan: &Output,
) -> Result<(), StdioError> {
    if fds.get(role).is_some() {
        return Ok(());
    }
    open::output_into(fds, role, stream, plan)
}

fn not_stored(source: io::Error) -> StdioError {
    StdioError::NotStored { source }
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
    fds.insert(stages).map_err(not_stored)?;
    match logger {
        // A terminal has no error output of its own: that pipe is closed here.
        Some(pipes) => {
            set_non_blocking(&pipes.stdout).map_err(failed)?;
            fds.insert([(FdRole::StdoutClient, StreamFd::new(pipes.stdout))])
                .map_err(not_stored)?;
        }
        None => open_output(fds, FdRole::StdoutClient, "stdout", &plan.stdout)?,
    }
    if let Some(path) = &plan.stdin
        && fds.first(INPUT).is_none()
    {
        open::input_into(fds, FdRole::StdinHeld, path, true)?;
    }
    Ok(())
}

/// The call of the runtime has failed, or was cut short: what is in the pipes are the runtime's own
/// words. The client's ends stay, for another attempt.
pub(crate) fn discard_pipes(fds: &ProcessFds) {
    fds.remove(&PIPES);
}

/// Takes over the client's ends of an attempt that was cut short.
pub(crate) fn adopt_client_ends(fds: &ProcessFds, of: &ProcessFds) -> io::Result<()> {
    fds.adopt(of, &CLIENT_ENDS)
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

/// Nothing is stored any more, since store and daemon ended together: finds the pipes of a living
/// process among its descriptors, opens the client's ends again by their paths, and stores all of
/// it. What is not there of one stream costs the others nothing. Blocks on procfs and on the file
/// system.
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
    fds.insert(set).map_err(not_stored)
}

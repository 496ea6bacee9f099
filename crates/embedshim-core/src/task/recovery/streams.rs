//! The streams of a process that a predecessor has left. Owns where they are found: among the
//! inherited descriptors, at the socket of a terminal, or in the process itself.

use std::sync::Arc;

use tracing::warn;

use crate::blocking::blocking;
use crate::error::Error;
use crate::fdstore::FdRole;
use crate::stdio::{self, ConsoleSocket, Idle, Plan, Streams};
use crate::task::launch::CONSOLE_DEADLINE;
use crate::task::lifecycle::Phase;
use crate::task::process::TaskProcess;
use crate::task::task::Task;

/// Takes the terminal that the runtime has handed over, or will, to the socket that a predecessor
/// has left.
pub(super) async fn take_terminal(task: &Task, process: &TaskProcess) {
    let taken = match ConsoleSocket::resume(&process.fds) {
        None => Ok(()),
        Some(Err(source)) => Err(Error::Internal(source.to_string())),
        Some(Ok(socket)) => socket.accept(CONSOLE_DEADLINE).await.map_err(Error::from),
    };
    if let Err(error) = taken {
        warn!(id = %task.id(), exec_id = ?process.exec, %error, "cannot take the terminal of an exec");
    }
}

/// Lets the streams of a process flow again, which is alive or has ended. What has to be found
/// first, on file systems that may not answer, is found in a task of its own.
pub(super) fn reconnect(idle: &Idle, task: &Arc<Task>, process: &Arc<TaskProcess>) {
    let (pipes, _) = process.pipes();
    if process.exec.is_none() && !pipes.is_empty() && !Streams::has_any(&process.fds) {
        let (idle, task, process) = (idle.clone(), Arc::clone(task), Arc::clone(process));
        tokio::spawn(async move {
            find_pipes(&task, &process).await;
            connect(&idle, &task, &process);
        });
        return;
    }
    connect(idle, task, process);
}

pub(super) fn connect(idle: &Idle, task: &Task, process: &TaskProcess) {
    let is_lost = process.stdio.terminal && process.fds.get(FdRole::Terminal).is_none();
    if is_lost && process.now().exit().is_none() {
        warn!(id = %task.id(), exec_id = ?process.exec, "a process has lost its terminal: no descriptor store had it");
    }
    if !Streams::has_any(&process.fds) {
        return;
    }
    process.connect(Streams::start(
        &process.fds,
        process.kind(),
        idle,
        task.id(),
    ));
    if process.exec.is_some() || process.stdio.terminal || process.now().phase() != Phase::Created {
        process.begin_input();
    }
}

/// Daemon and store have ended together: what the init has written meanwhile is in its pipes.
async fn find_pipes(task: &Task, process: &TaskProcess) {
    let (Some(identity), None) = (process.identity(), process.now().exit()) else {
        return;
    };
    let (pipes, is_stdin_closed) = process.pipes();
    let fds = process.fds.clone();
    let found = async {
        let plan = Plan::parse(&process.stdio)?;
        let found = move || stdio::find_again(&plan, pipes, identity, is_stdin_closed, &fds);
        blocking(found).await??;
        Ok::<_, Error>(())
    };
    if let Err(error) = found.await {
        warn!(id = %task.id(), %error, "cannot resume the streams of a container");
    }
}

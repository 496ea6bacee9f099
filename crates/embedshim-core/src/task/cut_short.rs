//! What a call of the OCI runtime has done that was killed, as by the OOM killer, or by us because
//! it was too slow. Owns how that is found out (invariant 22); changes nothing but the runtime's
//! note of a start that it has done.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::warn;

use crate::blocking::blocking;
use crate::error::Error;
use crate::exit::ExitStatus;
use crate::process::{Process, ProcessIdentity};
use crate::runtime::RuntimeStatus;
use crate::task::lifecycle::Phase;
use crate::task::task::Task;

/// How long an init may be on its way from the runtime's own code to the container's program.
const SETTLING: Duration = Duration::from_secs(5);
/// The time between two looks at it.
const PAUSE: Duration = Duration::from_millis(5);
/// What an init waits at for its start, in the runtime's directory of the container.
const START_FIFO: &str = "exec.fifo";
/// How the runtime's own code ends that has failed.
const RUNTIME_FAILURE: ExitStatus = ExitStatus::Exited(1);

/// What of a container is known beside its record.
pub(in crate::task) struct Known(Option<Phase>);

/// What the init of a container does that was to be started.
enum Init {
    /// It waits for its start.
    Waits,
    /// It executes the container's program, or is about to.
    Runs,
    Ended,
}

impl Known {
    /// Asks the runtime, and looks at the init.
    pub(in crate::task) async fn of(task: &Arc<Task>) -> Result<Self, Error> {
        if task.init.start_mark().is_some() {
            task.runtime.wait_for_start(task.id()).await;
        }
        let state = task.runtime.state(task.id(), &task.log()).await?;
        let phase = match state.status {
            // runc says so for as long as the container lives if its start was cut short right
            // after it had taken effect.
            RuntimeStatus::Created => match look(task).await? {
                Init::Waits => Phase::Created,
                Init::Runs => {
                    note_start(task).await?;
                    Phase::Running
                }
                Init::Ended => phase_of_ended(task).await?,
            },
            RuntimeStatus::Running => Phase::Running,
            RuntimeStatus::Paused => Phase::Paused,
            RuntimeStatus::Stopped => phase_of_ended(task).await?,
            RuntimeStatus::Creating | RuntimeStatus::Other => return Ok(Self(None)),
        };
        Ok(Self(Some(phase)))
    }

    /// Which phase that is.
    pub(in crate::task) fn phase(&self) -> Option<Phase> {
        self.0
    }
}

/// Looks at the init of a container that the runtime calls created.
async fn look(task: &Task) -> Result<Init, Error> {
    let mark = task.init.start_mark();
    let (Some(init), Some(program)) = (task.init.identity(), mark.and_then(|mark| mark.program))
    else {
        return Ok(Init::Waits);
    };
    blocking(move || watch(init, &program)).await
}

/// Notes for the runtime that a container is started, as it does last: to runc and crun one whose
/// fifo is there is created, and has no checkpoint, for as long as it lives.
async fn note_start(task: &Task) -> Result<(), Error> {
    let fifo = task.runtime.state_of(task.id()).join(START_FIFO);
    let removed = blocking(move || std::fs::remove_file(fifo)).await?;
    if let Err(error) = removed
        && error.kind() != ErrorKind::NotFound
    {
        warn!(id = %task.id(), %error, "the OCI runtime cannot be told that it has started this");
    }
    Ok(())
}

/// Watches an init until it executes another program than this, waits for its start, which it does
/// in opening a fifo (runc, crun), or ends. Blocks.
fn watch(init: ProcessIdentity, program: &Path) -> Init {
    let Ok(init) = Process::reopen(init) else {
        return Init::Ended;
    };
    let deadline = Instant::now() + SETTLING;
    loop {
        match init.program() {
            Some(now) if now != program => return Init::Runs,
            Some(_) => {}
            None => return Init::Ended,
        }
        if init.is_blocked_in(libc::SYS_openat) || Instant::now() > deadline {
            return Init::Waits;
        }
        std::thread::sleep(PAUSE);
    }
}

/// The phase in which an init has ended that was to be started: stopped if its program has run. A
/// runtime that is killed between opening the fifo and reading from it, which it removes after
/// that, makes its init end by an error of its own.
async fn phase_of_ended(task: &Task) -> Result<Phase, Error> {
    let fifo = task.runtime.state_of(task.id()).join(START_FIFO);
    if !blocking(move || fifo.exists()).await? {
        return Ok(Phase::Stopped);
    }
    let deadline = Instant::now() + SETTLING;
    while Instant::now() < deadline {
        match task.init.early_exit() {
            Some(exit) if exit.status == RUNTIME_FAILURE => return Ok(Phase::Created),
            Some(_) => break,
            None => tokio::time::sleep(PAUSE).await,
        }
    }
    Ok(Phase::Stopped)
}

/// The phase of a container after a call that has failed; `None` if the call was not cut short, and
/// so has done nothing.
pub(in crate::task) async fn phase_after(task: &Arc<Task>, error: &Error) -> Option<Phase> {
    if !matches!(error, Error::RuntimeKilled { .. }) {
        return None;
    }
    Known::of(task).await.ok()?.phase()
}

//! [`Lifecycle`]: where a process is in its life, with all that decides what may happen to it next.
//! [`Lifecycle::apply`] is the only function that changes it, [`Lifecycle::admit`] says what a
//! client may ask for, in runc-v2's words. Pure: never calls the runtime, writes or emits.
//! The picture is in the header of [`task`](super).

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::exit::{Evidence, ExitRecord, ExitStatus, UnknownReason};
use crate::task::api::{Exit, ProcessStatus};

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lifecycle {
    /// It was not started: its container is made, or it is an exec that is declared.
    Created,
    /// An operation that makes, starts or examines it is in flight. An exit that comes meanwhile
    /// waits for the operation's event.
    Starting {
        /// The exit that waits.
        early: Option<ExitRecord>,
    },
    /// It was started, and clients may see that. Its record is not written yet: an exit still
    /// waits.
    Started {
        /// The exit that waits.
        early: Option<ExitRecord>,
    },
    /// It runs.
    Running,
    /// The runtime freezes it.
    Pausing,
    /// It is frozen.
    Paused,
    /// It ended. How is known, but must not be visible before it is durable.
    Ended {
        /// How.
        exit: Exit,
        /// What clients see until then.
        shown: Phase,
    },
    /// It ended, and clients may know how.
    Stopped {
        /// How.
        exit: Exit,
    },
    /// Its start failed: who waited for its end has an answer. It may be started again, unless it
    /// may have run.
    StartFailed {
        /// Its runtime was killed before it said whether the process runs.
        may_have_run: bool,
    },
}

/// What can happen to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transition {
    /// An operation begins that makes, starts or examines it.
    Begin,
    /// The runtime has started it.
    Start,
    /// The operation that began is over, with its event emitted and its record written, or with
    /// nothing done.
    Release,
    /// The operation that began came to nothing, and an exit that waits is of no interest.
    Fail {
        /// Whether it ran is not known.
        may_have_run: bool,
    },
    /// What the operation has made is undone, and so is the exit of it that waits.
    Unmake,
    /// The runtime is about to freeze it.
    Freeze,
    /// The runtime has frozen it.
    Frozen,
    /// The runtime has thawed it, or it was not frozen after all.
    Thawed,
    /// A monitor reports its exit.
    Report(ExitRecord),
    /// Its exit is known.
    End(Exit),
    /// Its exit is durable, as far as it can be made so.
    Publish,
}

/// What a transition asks its caller to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing more.
    None,
    /// Conclude this exit now.
    Settle(ExitRecord),
}

/// The transition is not in the picture: nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a process that is {from:?} cannot {transition:?}")]
pub(crate) struct Refusal {
    from: Lifecycle,
    transition: Transition,
}

/// What clients see of a [`Lifecycle`], and what records hold of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    #[default]
    Created,
    Running,
    Pausing,
    Paused,
    Stopped,
}

/// What a client can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Operation {
    Start,
    Delete,
    Pause,
    Resume,
    Exec,
    Update,
    Checkpoint,
    Kill,
}

impl Lifecycle {
    /// Where a process was, by what its record says.
    pub(crate) fn recorded(
        phase: Phase,
        exit: Option<Exit>,
        start_failed: bool,
        may_have_run: bool,
    ) -> Self {
        match (phase, exit) {
            (_, Some(exit)) => Self::Stopped { exit },
            (Phase::Created, None) if start_failed => Self::StartFailed { may_have_run },
            (Phase::Created, None) => Self::Created,
            (Phase::Running, None) => Self::Running,
            (Phase::Pausing, None) => Self::Pausing,
            (Phase::Paused, None) => Self::Paused,
            (Phase::Stopped, None) => Self::Stopped {
                exit: unknown_exit(),
            },
        }
    }

    /// Changes it, if the picture has that transition; otherwise nothing is changed.
    pub(crate) fn apply(&mut self, transition: Transition) -> Result<Effect, Refusal> {
        use Transition as T;
        let from = *self;
        let to = match (from, transition) {
            // An operation in flight, and what comes of it.
            (
                Self::Created
                | Self::StartFailed {
                    may_have_run: false,
                },
                T::Begin,
            )
            | (Self::Starting { .. }, T::Unmake) => Self::Starting { early: None },
            (Self::Starting { early }, T::Start) => Self::Started { early },
            (Self::Starting { early }, T::Release) => return Ok(self.release(Self::Created, early)),
            (Self::Started { early }, T::Release) => return Ok(self.release(Self::Running, early)),
            (Self::Starting { .. }, T::Fail { may_have_run }) => Self::StartFailed { may_have_run },
            // Freezing.
            (Self::Running, T::Freeze) => Self::Pausing,
            (Self::Pausing, T::Frozen) => Self::Paused,
            (Self::Pausing | Self::Paused, T::Thawed) => Self::Running,
            // The end.
            (Self::Starting { early: None }, T::Report(record)) => Self::Starting {
                early: Some(record),
            },
            (Self::Started { early: None }, T::Report(record)) => Self::Started {
                early: Some(record),
            },
            // Reported twice: the first report counts.
            (Self::Starting { .. } | Self::Started { .. }, T::Report(_)) => from,
            (Self::Created | Self::Running | Self::Pausing | Self::Paused, T::Report(record)) => {
                return Ok(Effect::Settle(record));
            }
            (
                Self::Created
                | Self::Starting { .. }
                | Self::Started { .. }
                | Self::Running
                | Self::Pausing
                | Self::Paused,
                T::End(exit),
            ) => Self::Ended {
                exit,
                shown: from.phase(),
            },
            (Self::Ended { exit, .. }, T::Publish) => Self::Stopped { exit },
            _ => return Err(Refusal { from, transition }),
        };
        *self = to;
        Ok(Effect::None)
    }

    fn release(&mut self, to: Self, early: Option<ExitRecord>) -> Effect {
        *self = to;
        early.map_or(Effect::None, Effect::Settle)
    }

    /// What clients see.
    pub(crate) fn phase(self) -> Phase {
        match self {
            Self::Created | Self::Starting { .. } | Self::StartFailed { .. } => Phase::Created,
            Self::Started { .. } | Self::Running => Phase::Running,
            Self::Pausing => Phase::Pausing,
            Self::Paused => Phase::Paused,
            Self::Ended { shown, .. } => shown,
            Self::Stopped { .. } => Phase::Stopped,
        }
    }

    /// What its record has to say: an exit is written down before it is visible.
    pub(crate) fn phase_to_record(self) -> Phase {
        match self {
            Self::Ended { .. } => Phase::Stopped,
            other => other.phase(),
        }
    }

    /// How it ended, for clients.
    pub(crate) fn exit(self) -> Option<Exit> {
        match self {
            Self::Stopped { exit } => Some(exit),
            _ => None,
        }
    }

    /// How it ended, visible or not.
    pub(crate) fn known_exit(self) -> Option<Exit> {
        match self {
            Self::Ended { exit, .. } | Self::Stopped { exit } => Some(exit),
            _ => None,
        }
    }

    /// Admits the operation, or refuses it as runc-v2 would.
    pub(crate) fn admit(self, operation: Operation) -> Result<(), Error> {
        self.phase().admit(operation)
    }
}

impl Phase {
    /// The phase as the API shows it.
    pub(crate) fn status(self) -> ProcessStatus {
        match self {
            Self::Created => ProcessStatus::Created,
            Self::Running => ProcessStatus::Running,
            Self::Pausing => ProcessStatus::Pausing,
            Self::Paused => ProcessStatus::Paused,
            Self::Stopped => ProcessStatus::Stopped,
        }
    }

    fn admit(self, operation: Operation) -> Result<(), Error> {
        use Operation as O;
        let refusal = match (operation, self) {
            (O::Start, Self::Running) => "cannot start a running process",
            (O::Start, Self::Pausing | Self::Paused) => "cannot start a paused process",
            (O::Start, Self::Stopped) => "cannot start a stopped process",
            (O::Delete, Self::Running) => "cannot delete a running process",
            (O::Delete, Self::Pausing | Self::Paused) => "cannot delete a paused process",
            (O::Pause, Self::Created) => "cannot pause task in created state",
            (O::Pause, Self::Pausing | Self::Paused) => "cannot pause a paused container",
            (O::Pause, Self::Stopped) => "cannot pause a stopped container",
            (O::Resume, Self::Created) => "cannot resume task in created state",
            (O::Resume, Self::Running) => "cannot resume a running process",
            (O::Resume, Self::Stopped) => "cannot resume a stopped container",
            (O::Exec, Self::Pausing | Self::Paused) => "cannot exec in a paused state",
            (O::Exec, Self::Stopped) => "cannot exec in a stopped state",
            (O::Update, Self::Stopped) => "cannot update a stopped container",
            (O::Checkpoint, Self::Created) => "cannot checkpoint a task in created state",
            (O::Checkpoint, Self::Stopped) => "cannot checkpoint a stopped container",
            (O::Kill, Self::Stopped) => return Err(Error::AlreadyFinished),
            _ => return Ok(()),
        };
        Err(Error::WrongState(refusal))
    }
}

/// The exit of a process whose record says that it ended, and not how: an older version's.
fn unknown_exit() -> Exit {
    let status = ExitStatus::Unknown {
        reason: UnknownReason::Unwatched,
    };
    Exit {
        code: status.code(),
        at: std::time::UNIX_EPOCH,
        status: Some(status),
        evidence: Some(Evidence::None),
    }
}

#[cfg(test)]
mod tests;

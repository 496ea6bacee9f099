//! The state machine of a process, as data: which operation is admitted in which phase, and runc-v2's words for a
//! refusal (`containerd.md` 4.2). Pure; it changes nothing.
//!
//! ```text
//!               start                pause
//!   Created ------------> Running ---------> Paused
//!      |                     |  <---------      |
//!      |                     |     resume       |
//!      +------ exit ---------+------ exit ------+----> Stopped --delete--> (gone)
//!      +---- delete (kills first) ------------------------------------------^
//! ```

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::task::api::ProcessStatus;

/// Where a process is in its life.
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

    /// Admits the operation, or refuses it as runc-v2 would.
    pub(crate) fn admit(self, operation: Operation) -> Result<(), Error> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_runc_v2s() {
        let phases = [
            Phase::Created,
            Phase::Running,
            Phase::Paused,
            Phase::Stopped,
        ];
        let operations = [
            Operation::Start,
            Operation::Delete,
            Operation::Pause,
            Operation::Resume,
            Operation::Exec,
            Operation::Update,
            Operation::Checkpoint,
            Operation::Kill,
        ];
        let mut table = Vec::new();
        for operation in operations {
            for phase in phases {
                let answer = phase
                    .admit(operation)
                    .map_or_else(|e| e.to_string(), |()| "ok".into());
                table.push(format!("{operation:?} {phase:?}: {answer}"));
            }
        }
        insta::assert_snapshot!(table.join("\n"));
    }
}

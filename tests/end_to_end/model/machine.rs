//! The state machine of a task as runc-v2 has it (`docs/shim-contract.md`, "Task states"): what
//! each step answers in each state, and what it changes. Pure.

use std::collections::BTreeMap;

use proptest::prelude::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Create,
    Start,
    Kill,
    Pause,
    Resume,
    Delete,
    State,
    Stats,
    Pids,
    AddExec(u8),
    StartExec(u8),
    KillExec(u8),
    DeleteExec(u8),
}

pub(super) fn step() -> impl Strategy<Value = Step> {
    let exec = 0..2_u8;
    prop_oneof![
        3 => Just(Step::Create),
        3 => Just(Step::Start),
        2 => Just(Step::Kill),
        1 => Just(Step::Pause),
        2 => Just(Step::Resume),
        2 => Just(Step::Delete),
        1 => Just(Step::State),
        1 => Just(Step::Stats),
        1 => Just(Step::Pids),
        2 => exec.clone().prop_map(Step::AddExec),
        2 => exec.clone().prop_map(Step::StartExec),
        1 => exec.clone().prop_map(Step::KillExec),
        1 => exec.prop_map(Step::DeleteExec),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Created,
    Running,
    Paused,
    Stopped,
}

/// What a task should be like.
#[derive(Debug, Default)]
pub(super) struct Model {
    pub(super) init: Option<Phase>,
    pub(super) execs: BTreeMap<u8, Phase>,
}

/// Words that the refusal must contain; none where it is admitted.
pub(super) type Expected = Option<&'static str>;

pub(super) const NO_TASK: Expected = Some("container not created");
pub(super) const NO_EXEC: Expected = Some("process does not exist");

impl Model {
    /// What this step should answer now.
    pub(super) fn expects(&self, step: Step) -> Expected {
        use Phase as P;
        let Some(init) = self.init else {
            return if step == Step::Create { None } else { NO_TASK };
        };
        match step {
            Step::Create => Some("already exists"),
            Step::State | Step::Pids | Step::Stats => None,
            Step::Start => match init {
                P::Created => None,
                P::Running => Some("cannot start a running process"),
                P::Paused => Some("cannot start a paused process"),
                P::Stopped => Some("cannot start a stopped process"),
            },
            Step::Kill => (init == P::Stopped).then_some("process already finished"),
            Step::Pause => match init {
                P::Created => Some("cannot pause task in created state"),
                P::Running => None,
                P::Paused => Some("cannot pause a paused container"),
                P::Stopped => Some("cannot pause a stopped container"),
            },
            Step::Resume => match init {
                P::Created => Some("cannot resume task in created state"),
                P::Running => Some("cannot resume a running process"),
                P::Paused => None,
                P::Stopped => Some("cannot resume a stopped container"),
            },
            Step::Delete => match init {
                P::Running => Some("cannot delete a running process"),
                P::Paused => Some("cannot delete a paused process"),
                P::Created | P::Stopped => None,
            },
            Step::AddExec(exec) if self.execs.contains_key(&exec) => Some("already exists"),
            Step::AddExec(_) => match init {
                P::Paused => Some("cannot exec in a paused state"),
                P::Stopped => Some("cannot exec in a stopped state"),
                _ => None,
            },
            Step::StartExec(_) if init == P::Stopped => Some("init process is not running"),
            Step::StartExec(exec) => match self.execs.get(&exec) {
                None => NO_EXEC,
                Some(P::Running | P::Paused) => Some("cannot start a running process"),
                Some(P::Stopped) => Some("cannot start a stopped process"),
                Some(P::Created) if init == P::Paused => Some("OCI runtime exec failed"),
                Some(P::Created) => None,
            },
            Step::KillExec(exec) => match self.execs.get(&exec) {
                None => NO_EXEC,
                Some(P::Created) => Some("process not created"),
                Some(P::Stopped) => Some("process already finished"),
                Some(_) => None,
            },
            Step::DeleteExec(exec) => match self.execs.get(&exec) {
                None => NO_EXEC,
                Some(P::Running | P::Paused) => Some("cannot delete a running process"),
                Some(_) => None,
            },
        }
    }

    /// The step was admitted.
    pub(super) fn take(&mut self, step: Step) {
        match step {
            Step::Create => self.init = Some(Phase::Created),
            Step::Start | Step::Resume => self.init = Some(Phase::Running),
            Step::Pause => self.init = Some(Phase::Paused),
            Step::Kill => {
                self.init = Some(Phase::Stopped);
                for exec in self
                    .execs
                    .values_mut()
                    .filter(|exec| **exec == Phase::Running)
                {
                    *exec = Phase::Stopped;
                }
            }
            Step::Delete => *self = Self::default(),
            Step::AddExec(exec) => drop(self.execs.insert(exec, Phase::Created)),
            Step::StartExec(exec) => drop(self.execs.insert(exec, Phase::Running)),
            // A frozen exec dies when it is thawed.
            Step::KillExec(exec) => drop(self.execs.insert(exec, Phase::Stopped)),
            Step::DeleteExec(exec) => drop(self.execs.remove(&exec)),
            Step::State | Step::Stats | Step::Pids => {}
        }
    }
}

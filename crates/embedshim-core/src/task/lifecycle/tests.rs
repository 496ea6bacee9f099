//! The whole picture as a table, and random walks through it.

use proptest::prelude::*;

use super::*;
use crate::clock::BootTime;
use crate::exit::Evidence;
use crate::process::ProcessIdentity;

fn record(number: i32) -> ExitRecord {
    ExitRecord {
        process: ProcessIdentity {
            pid: number,
            start_ticks: 1,
            inode: None,
        },
        status: ExitStatus::Exited(7),
        at: BootTime(1),
        evidence: Evidence::Wait,
    }
}

fn exit(code: u32) -> Exit {
    Exit {
        code,
        at: std::time::UNIX_EPOCH,
        status: None,
        evidence: None,
    }
}

/// Each kind of state.
fn states() -> Vec<(&'static str, Lifecycle)> {
    use Lifecycle as L;
    let early = Some(record(1));
    let ended = |shown| L::Ended {
        exit: exit(1),
        shown,
    };
    vec![
        ("Created", L::Created),
        ("Starting", L::Starting { early: None }),
        ("Starting, exit waits", L::Starting { early }),
        ("Started", L::Started { early: None }),
        ("Started, exit waits", L::Started { early }),
        ("Running", L::Running),
        ("Pausing", L::Pausing),
        ("Paused", L::Paused),
        ("Ended", ended(Phase::Running)),
        ("Stopped", L::Stopped { exit: exit(1) }),
        (
            "StartFailed",
            L::StartFailed {
                may_have_run: false,
            },
        ),
        (
            "StartFailed, may have run",
            L::StartFailed { may_have_run: true },
        ),
    ]
}

fn transitions() -> Vec<(&'static str, Transition)> {
    use Transition as T;
    vec![
        ("Begin", T::Begin),
        ("Start", T::Start),
        ("Release", T::Release),
        (
            "Fail",
            T::Fail {
                may_have_run: false,
            },
        ),
        ("Fail, may have run", T::Fail { may_have_run: true }),
        ("Unmake", T::Unmake),
        ("Freeze", T::Freeze),
        ("Frozen", T::Frozen),
        ("Thawed", T::Thawed),
        ("Report", T::Report(record(1))),
        ("End", T::End(exit(1))),
        ("Publish", T::Publish),
    ]
}

fn name(state: Lifecycle) -> &'static str {
    let named = states()
        .into_iter()
        .find(|(_, known)| match (known, &state) {
            (Lifecycle::Ended { .. }, Lifecycle::Ended { .. }) => true,
            _ => *known == state,
        });
    named.map_or("a state without a name", |(name, _)| name)
}

#[test]
fn the_picture_has_these_transitions_and_no_others() {
    let mut table = Vec::new();
    for (from, state) in states() {
        for (what, transition) in transitions() {
            let mut to = state;
            match to.apply(transition) {
                Ok(Effect::None) => table.push(format!("{from} --{what}--> {}", name(to))),
                Ok(Effect::Settle(_)) => {
                    table.push(format!(
                        "{from} --{what}--> {}, conclude the exit",
                        name(to)
                    ));
                }
                Err(refusal) => {
                    assert_eq!(to, state, "{refusal}: refused and changed");
                }
            }
        }
    }
    insta::assert_snapshot!(table.join("\n"));
}

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

fn any_transition() -> impl Strategy<Value = Transition> {
    let numbers = (1..100_i32).prop_map(|number| Transition::Report(record(number)));
    let codes = (0..256_u32).prop_map(|code| Transition::End(exit(code)));
    let plain: Vec<Transition> = transitions().into_iter().map(|(_, it)| it).collect();
    prop_oneof![proptest::sample::select(plain), numbers, codes]
}

proptest! {
    /// Invariants 3 and 5, for every sequence of transitions from every state that a record can
    /// bring about: one exit a process, never changed, visible only when published; an exit that is
    /// reported is concluded now or at the release, unless the start failed or was undone.
    #[test]
    fn no_sequence_loses_or_repeats_an_exit(
        first in 0..12_usize,
        steps in proptest::collection::vec(any_transition(), 0..40),
    ) {
        let mut state = states()[first].1;
        let mut waiting = match state {
            Lifecycle::Starting { early } | Lifecycle::Started { early } => early,
            _ => None,
        };
        for step in steps {
            let before = state;
            let answer = state.apply(step);
            if answer.is_err() {
                prop_assert_eq!(before, state);
                continue;
            }
            match (step, answer) {
                (Transition::Report(_), Ok(Effect::Settle(told))) => {
                    prop_assert_eq!(Transition::Report(told), step);
                    prop_assert!(waiting.is_none());
                }
                (Transition::Report(record), Ok(Effect::None)) => {
                    waiting = waiting.or(Some(record));
                }
                (Transition::Release, Ok(Effect::Settle(told))) => {
                    prop_assert_eq!(waiting.take(), Some(told));
                }
                (Transition::Release, Ok(Effect::None)) => prop_assert!(waiting.is_none()),
                (
                    Transition::Fail { .. } | Transition::Unmake | Transition::End(_),
                    Ok(Effect::None),
                ) => waiting = None,
                (_, effect) => prop_assert_eq!(effect, Ok(Effect::None)),
            }
            if let Some(known) = before.known_exit() {
                prop_assert_eq!(state.known_exit(), Some(known));
            }
            if state.exit().is_some() && before.exit().is_none() {
                prop_assert_eq!(step, Transition::Publish);
                prop_assert!(before.known_exit().is_some());
            }
            if state.phase() != before.phase() {
                let was_ended = matches!(before, Lifecycle::Ended { .. });
                prop_assert!(!was_ended || step == Transition::Publish);
            }
        }
    }

    /// What a record says of a state is where a successor takes it up.
    #[test]
    fn a_successor_takes_up_what_was_recorded(
        first in 0..12_usize,
        steps in proptest::collection::vec(any_transition(), 0..40),
    ) {
        let mut state = states()[first].1;
        for step in steps {
            let _ = state.apply(step);
        }
        let failed = match state {
            Lifecycle::StartFailed { may_have_run } => Some(may_have_run),
            _ => None,
        };
        let taken_up = Lifecycle::recorded(
            state.phase_to_record(),
            state.known_exit(),
            failed.is_some(),
            failed.unwrap_or(false),
        );
        let expected = match state {
            Lifecycle::Starting { .. } => Lifecycle::Created,
            Lifecycle::Started { .. } => Lifecycle::Running,
            Lifecycle::Ended { exit, .. } => Lifecycle::Stopped { exit },
            other => other,
        };
        prop_assert_eq!(taken_up, expected);
    }
}

//! [`Life`]: what one container does and what is done to it, from its creation to its deletion, and with which code it ends.
//! A function of the seed; knows nothing of how it is carried out.

use crate::random::Random;

/// What a process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    /// Ends by itself.
    Exit { code: u32, after_ms: u64 },
    /// Ends with this code at SIGTERM.
    UntilTerm { code: u32 },
    /// Ends with this code at the end of its input.
    UntilEof { code: u32 },
    /// Never ends by itself; for an init, SIGTERM is nothing either.
    Sleep,
    /// Dies of SIGSEGV.
    Fault,
    /// Its main thread is gone long before another ends it.
    LeaderFirst { code: u32, after_ms: u64 },
    /// Is not there.
    Missing,
}

/// 128 and SIGKILL.
pub(crate) const KILLED: u32 = 137;
const SEGMENTATION_FAULT: u32 = 139;

impl Program {
    pub(crate) fn arguments(self) -> Vec<String> {
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        match self {
            Self::Exit { code, after_ms: 0 } => words(&["/bin/sh", "-c", &format!("exit {code}")]),
            Self::Exit { code, after_ms } => {
                let script = format!(
                    "sleep {}.{:03}; exit {code}",
                    after_ms / 1000,
                    after_ms % 1000
                );
                words(&["/bin/sh", "-c", &script])
            }
            Self::UntilTerm { code } => words(&["/bin/guest", "until-term", &code.to_string()]),
            Self::UntilEof { code } => {
                words(&["/bin/sh", "-c", &format!("cat > /dev/null; exit {code}")])
            }
            Self::Sleep => words(&["/bin/sleep", "100000"]),
            Self::Fault => words(&["/bin/guest", "fault"]),
            Self::LeaderFirst { code, after_ms } => words(&[
                "/bin/guest",
                "leader-first",
                &code.to_string(),
                &after_ms.to_string(),
            ]),
            Self::Missing => words(&["/bin/missing"]),
        }
    }

    /// The code with which it ends if nobody kills it.
    pub(crate) fn own_code(self) -> u32 {
        match self {
            Self::Exit { code, .. }
            | Self::UntilTerm { code }
            | Self::UntilEof { code }
            | Self::LeaderFirst { code, .. } => code,
            Self::Fault => SEGMENTATION_FAULT,
            Self::Sleep | Self::Missing => KILLED,
        }
    }

    /// Goes on until something is done to it.
    pub(crate) fn is_lasting(self) -> bool {
        matches!(
            self,
            Self::UntilTerm { .. } | Self::UntilEof { .. } | Self::Sleep
        )
    }

    fn short(random: &mut Random) -> Self {
        let code = random.code();
        match random.below(6) {
            0 | 1 => Self::Exit { code, after_ms: 0 },
            2 => Self::Fault,
            3 => Self::LeaderFirst {
                code,
                after_ms: random.millis(200),
            },
            _ => Self::Exit {
                code,
                after_ms: 1 + random.millis(400),
            },
        }
    }
}

/// How a process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// By itself.
    Itself,
    Term,
    Kill,
    /// The end of its input.
    CloseIo,
    /// It is killed about when it ends by itself: either may come first.
    Race {
        after_ms: u64,
    },
    /// An exec that is still there when its container ends.
    WithInit,
    /// An init that is deleted before it is started.
    Unstarted,
}

/// A further process in a container.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exec {
    pub(crate) program: Program,
    pub(crate) end: End,
    /// Waited for before it is started, or only when it may be over.
    pub(crate) waits_early: bool,
}

/// What happens to a container that runs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    Read,
    Pause,
    Exec(Exec),
    /// Several at the same time, as probes are.
    Probes {
        count: u64,
        code: u32,
    },
    CreateAgain,
    StartAgain,
    DeleteEarly,
    Rest {
        ms: u64,
    },
}

/// Where its root file system comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rootfs {
    /// Is there already.
    Shared,
    /// The shim mounts it.
    Bind,
    /// The same, a kind that has work to do at the end.
    Overlay,
}

/// One container.
#[derive(Clone, Debug)]
pub(crate) struct Life {
    pub(crate) rootfs: Rootfs,
    pub(crate) program: Program,
    pub(crate) end: End,
    pub(crate) waits_early: bool,
    pub(crate) steps: Vec<Step>,
}

impl Life {
    pub(crate) fn of(random: &mut Random) -> Self {
        let rootfs = match random.below(3) {
            0 => Rootfs::Shared,
            1 => Rootfs::Bind,
            _ => Rootfs::Overlay,
        };
        let code = random.code();
        let (program, end) = match random.below(20) {
            0..=3 => (Program::short(random), End::Itself),
            4..=7 => (Program::UntilTerm { code }, End::Term),
            8 => (Program::UntilTerm { code }, End::Kill),
            9..=12 => (Program::Sleep, End::Kill),
            13..=15 => (Program::UntilEof { code }, End::CloseIo),
            16 => (Program::UntilEof { code }, End::Kill),
            17 => {
                let after_ms = 50 + random.millis(300);
                let end = End::Race {
                    after_ms: random.millis(2 * after_ms),
                };
                (Program::Exit { code, after_ms }, end)
            }
            18 => (Program::Sleep, End::Unstarted),
            _ => (Program::Missing, End::Itself),
        };
        let count = if program.is_lasting() && end != End::Unstarted {
            random.below(7)
        } else {
            0
        };
        Self {
            rootfs,
            program,
            end,
            waits_early: random.chance(60),
            steps: (0..count).map(|_| Step::of(random)).collect(),
        }
    }

    /// The codes that are right: one, unless two ends race.
    pub(crate) fn codes(&self) -> Vec<u32> {
        codes(self.program, self.end)
    }
}

impl Exec {
    pub(crate) fn codes(&self) -> Vec<u32> {
        codes(self.program, self.end)
    }
}

fn codes(program: Program, end: End) -> Vec<u32> {
    match end {
        End::Kill | End::WithInit | End::Unstarted => vec![KILLED],
        End::Race { .. } => vec![program.own_code(), KILLED],
        End::Itself | End::Term | End::CloseIo => vec![program.own_code()],
    }
}

impl Step {
    fn of(random: &mut Random) -> Self {
        match random.below(20) {
            0..=2 => Self::Read,
            3..=5 => Self::Pause,
            6..=12 => Self::Exec(Exec::of(random)),
            13..=14 => Self::Probes {
                count: 2 + random.below(3),
                code: random.code(),
            },
            15 => Self::CreateAgain,
            16 => Self::StartAgain,
            17 => Self::DeleteEarly,
            _ => Self::Rest {
                ms: random.millis(300),
            },
        }
    }
}

impl Exec {
    fn of(random: &mut Random) -> Self {
        let code = random.code();
        let (program, end) = match random.below(10) {
            0..=4 => (Program::short(random), End::Itself),
            5 | 6 => (Program::Sleep, End::Kill),
            7 => (Program::UntilTerm { code }, End::Term),
            8 => (Program::Sleep, End::WithInit),
            _ => (Program::Missing, End::Itself),
        };
        Self {
            program,
            end,
            waits_early: random.chance(60),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life_is_a_function_of_the_seed() {
        let life = |seed| format!("{:?}", Life::of(&mut Random::of(seed, &[3, 4])));
        assert_eq!(life(1), life(1));
        assert!((2..20).any(|seed| life(seed) != life(1)));
    }

    #[test]
    fn no_life_ends_with_the_code_of_what_is_not_known() {
        for seed in 0..500 {
            let life = Life::of(&mut Random::of(seed, &[]));
            assert!(!life.codes().contains(&255) && !life.codes().contains(&0));
        }
    }
}

//! [`Life`]: what one container does and what is done to it, from its creation to its deletion,
//! with which code it ends, and where its streams go. A function of the seed; knows nothing of how
//! it is carried out.

use crate::program::{KILLED, Lines, Program};
use crate::random::Random;

/// Where the outputs of a process go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sink {
    /// To fifos, whose other ends the client reads.
    Fifo,
    /// `binary://`.
    Logger,
    /// `file://`.
    File,
}

/// The streams of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Streams {
    pub(crate) terminal: bool,
    pub(crate) sink: Sink,
    /// The client reads more slowly than the process writes.
    pub(crate) is_slow: bool,
    /// The client writes its input before the process is started.
    pub(crate) writes_early: bool,
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
    /// SIGKILL to all processes of the container, which the runtime sends.
    KillAll,
    /// The first container of its pod is killed, whose pid namespace it shares.
    WithPod,
}

/// One process, an init or an exec.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProcessPlan {
    pub(crate) program: Program,
    pub(crate) end: End,
    pub(crate) streams: Streams,
    pub(crate) lines: Lines,
    /// Waited for before it is started, or only when it may be over.
    pub(crate) waits_early: bool,
    /// Nothing is done to it before all its own lines have come.
    pub(crate) is_awaited: bool,
}

/// What happens to a container that runs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    Read,
    Pause,
    Exec(ProcessPlan),
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
    pub(crate) init: ProcessPlan,
    pub(crate) steps: Vec<Step>,
    /// Its state is written to files twice: once while it goes on, once to its end, and from that
    /// it goes on.
    pub(crate) is_checkpointed: bool,
}

impl Life {
    pub(crate) fn of(random: &mut Random) -> Self {
        let rootfs = match random.below(3) {
            0 => Rootfs::Shared,
            1 => Rootfs::Bind,
            _ => Rootfs::Overlay,
        };
        if random.chance(5) {
            return Self::of_checkpoint(random);
        }
        let code = random.code();
        let (program, end) = match random.below(21) {
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
            19 => (Program::Sleep, End::KillAll),
            _ => (Program::Missing, End::Itself),
        };
        let count = if program.is_lasting() && end != End::Unstarted {
            random.below(7)
        } else {
            0
        };
        Self {
            rootfs,
            init: ProcessPlan::of(random, program, end, 55),
            steps: (0..count).map(|_| Step::of(random)).collect(),
            is_checkpointed: false,
        }
    }

    fn of_checkpoint(random: &mut Random) -> Self {
        let code = random.code();
        let (program, end) = if random.chance(50) {
            (Program::UntilTerm { code }, End::Term)
        } else {
            (Program::Sleep, End::Kill)
        };
        Self::checkpointed(program, end)
    }

    /// A container that goes on from a checkpoint. Its root has to be writable for that.
    pub(crate) fn checkpointed(program: Program, end: End) -> Self {
        let mut init = ProcessPlan::plain(program, end);
        init.is_awaited = true;
        Self {
            is_checkpointed: true,
            ..Self::of_init(init)
        }
    }

    /// A container on an overlay in which nothing else runs.
    pub(crate) fn of_init(init: ProcessPlan) -> Self {
        Self {
            rootfs: Rootfs::Overlay,
            init,
            steps: Vec::new(),
            is_checkpointed: false,
        }
    }
}

impl ProcessPlan {
    /// A process whose streams are fifos in so many of a hundred cases.
    fn of(random: &mut Random, program: Program, end: End, fifos: u64) -> Self {
        let streams = Streams::of(random, program, fifos);
        Self {
            program,
            end,
            streams,
            lines: Lines::of(random, streams),
            waits_early: random.chance(60),
            is_awaited: program.is_lasting() && end != End::Unstarted && random.chance(50),
        }
    }

    fn exec(random: &mut Random) -> Self {
        let code = random.code();
        let (program, end) = match random.below(11) {
            0..=4 => (Program::short(random), End::Itself),
            5 | 6 => (Program::Sleep, End::Kill),
            7 => (Program::UntilTerm { code }, End::Term),
            8 => (Program::Sleep, End::WithInit),
            9 => (Program::UntilEof { code }, End::CloseIo),
            _ => (Program::Missing, End::Itself),
        };
        Self::of(random, program, end, 80)
    }

    /// A process with fifos and a few lines.
    pub(crate) fn plain(program: Program, end: End) -> Self {
        Self {
            program,
            end,
            streams: Streams {
                terminal: false,
                sink: Sink::Fifo,
                is_slow: false,
                writes_early: false,
            },
            lines: Lines {
                out: 40,
                err: 20,
                input: 60,
            },
            waits_early: true,
            is_awaited: false,
        }
    }

    /// The same with a terminal, which has one output.
    pub(crate) fn on_terminal(mut self) -> Self {
        self.streams.terminal = true;
        self.lines.err = 0;
        self
    }

    /// The same with a logger or a log file. In a file, pieces of one output may come between parts
    /// of a line of the other: only one is written to.
    pub(crate) fn to(mut self, sink: Sink) -> Self {
        self.streams.sink = sink;
        if sink == Sink::File {
            self.lines.err = 0;
        }
        self
    }

    /// What is left to write for one that has shown all its lines and goes on from a checkpoint.
    pub(crate) fn without_lines(mut self) -> Self {
        self.lines = Lines::default();
        self.is_awaited = false;
        self
    }

    /// The codes that are right: one, unless two ends race.
    pub(crate) fn codes(&self) -> Vec<u32> {
        let own = self.program.own_code();
        match self.end {
            End::Kill | End::KillAll | End::WithInit | End::WithPod | End::Unstarted => {
                vec![KILLED]
            }
            End::Race { .. } => vec![own, KILLED],
            End::Itself | End::Term | End::CloseIo => vec![own],
        }
    }
}

impl Streams {
    fn of(random: &mut Random, program: Program, fifos: u64) -> Self {
        let terminal = random.chance(25);
        let sink = match random.below(100) {
            number if number < fifos => Sink::Fifo,
            // A logger's pipe is the runtime's too, as with runc-v2: it hears why there is no
            // process.
            number if number % 2 == 0 && program != Program::Missing => Sink::Logger,
            _ => Sink::File,
        };
        // What a client writes to a terminal comes back until the process has said that it shall
        // not.
        let reads = matches!(program, Program::UntilEof { .. }) && !terminal;
        Self {
            terminal,
            sink,
            is_slow: random.chance(25),
            writes_early: reads && random.chance(50),
        }
    }
}

impl Lines {
    fn of(random: &mut Random, streams: Streams) -> Self {
        let mut count = |many| {
            if random.chance(many) {
                10_000 + random.below(30_000)
            } else {
                1 + random.below(300)
            }
        };
        // More than a pipe holds: 6 bytes a line.
        let (mut out, mut err, mut input) = (count(25), count(10), count(25));
        if streams.terminal {
            (out, err, input) = (1 + out / 8, 0, 1 + input / 8);
        } else if streams.sink == Sink::File {
            err = 0;
        }
        Self { out, err, input }
    }
}

impl Step {
    fn of(random: &mut Random) -> Self {
        match random.below(20) {
            0..=2 => Self::Read,
            3..=5 => Self::Pause,
            6..=12 => Self::Exec(ProcessPlan::exec(random)),
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
            assert!(!life.init.codes().contains(&255) && !life.init.codes().contains(&0));
        }
    }
}

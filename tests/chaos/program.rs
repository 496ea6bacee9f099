//! [`Program`]: what a process does, with which code it ends by itself, and what it writes: its
//! lines, as many as the plan says. Knows how that is put to a shell, and what therefore has to
//! arrive.

use crate::plan::ProcessPlan;
use crate::random::Random;
use crate::sequence::{Due, lines};

/// What a process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    /// Ends by itself.
    Exit { code: u32, after_ms: u64 },
    /// Ends with this code at SIGTERM.
    UntilTerm { code: u32 },
    /// Copies its input to its output, and ends with this code at the end of it.
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

/// The error output has numbers of its own.
const FIRST_OF_STDERR: u64 = 1_000_001;
/// What takes time writes in so many pieces.
const PIECES: u64 = 8;
/// The guest says this when it handles SIGTERM.
const READY: &[u8] = b"ready\n";

/// How many lines a process writes, and gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lines {
    pub(crate) out: u64,
    pub(crate) err: u64,
    /// Written by the client, after those of `out` in number.
    pub(crate) input: u64,
}

/// One of a process's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    Stdout,
    Stderr,
    /// A log file gets both.
    Both,
}

impl Program {
    /// The code with which it ends if nothing kills it.
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

    /// What ends by itself.
    pub(crate) fn short(random: &mut Random) -> Self {
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

    /// What it does after it has written its lines, for a shell.
    fn rest(self) -> String {
        match self {
            Self::Exit { code, .. } => format!("exit {code}"),
            Self::UntilTerm { code } => format!("exec /bin/guest until-term {code}"),
            Self::UntilEof { code } => format!("cat; exit {code}"),
            Self::Sleep => "exec /bin/sleep 100000".into(),
            Self::Fault => "exec /bin/guest fault".into(),
            Self::LeaderFirst { code, after_ms } => {
                format!("exec /bin/guest leader-first {code} {after_ms}")
            }
            Self::Missing => "exec /bin/missing".into(),
        }
    }
}

impl ProcessPlan {
    /// The command.
    pub(crate) fn arguments(&self) -> Vec<String> {
        if self.program == Program::Missing {
            return vec!["/bin/missing".into()];
        }
        // What a client writes to a terminal would come back.
        let prepare = match self.program {
            Program::UntilEof { .. } if self.streams.terminal => "stty -echo; ",
            _ => "",
        };
        let script = format!("{prepare}{}{}", self.writing(), self.program.rest());
        vec!["/bin/sh".into(), "-c".into(), script]
    }

    /// How the lines are written: at once, both outputs at the same time, or in pieces.
    fn writing(&self) -> String {
        let Lines { out, err, .. } = self.lines;
        let last = FIRST_OF_STDERR + err - u64::from(err > 0);
        let err = match err {
            0 => String::new(),
            _ => format!("seq {FIRST_OF_STDERR} {last} >&2 & "),
        };
        let end = if err.is_empty() { "" } else { "wait; " };
        let out = match self.program {
            Program::Exit { after_ms, .. } if after_ms > 0 => {
                let pause = after_ms * 1000 / PIECES;
                let pieces = (0..PIECES).map(|piece| {
                    let (from, to) = (out * piece / PIECES, out * (piece + 1) / PIECES);
                    let seq = if to > from {
                        format!("seq {} {to}; ", from + 1)
                    } else {
                        String::new()
                    };
                    format!("{seq}sleep 0.{pause:06}; ")
                });
                pieces.collect()
            }
            _ if out > 0 => format!("seq 1 {out}; "),
            _ => String::new(),
        };
        format!("{err}{out}{end}")
    }

    /// What the client writes to its input.
    pub(crate) fn input(&self) -> Vec<u8> {
        let mut input = match self.program {
            Program::UntilEof { .. } => lines(self.lines.out + 1, self.lines.input),
            _ => Vec::new(),
        };
        if self.streams.terminal && !input.is_empty() {
            // The end of input, as one types it.
            input.push(4);
        }
        input
    }

    /// How many bytes of an output come whatever happens, but for a kill.
    pub(crate) fn lines_due(&self, output: Output) -> usize {
        self.due(output, None, true).at_least
    }

    /// What has to arrive of a process that has ended with this code, if it has. `has_shown` says
    /// that all its own lines were seen before anything was done to it.
    pub(crate) fn due(&self, output: Output, code: Option<u32>, has_shown: bool) -> Due {
        let is_done = code == Some(self.program.own_code()) && self.program != Program::Sleep;
        let mut all = match output {
            _ if self.program == Program::Missing => return Due::default(),
            Output::Stdout => lines(1, self.lines.out),
            Output::Stderr => lines(FIRST_OF_STDERR, self.lines.err),
            Output::Both => [
                lines(1, self.lines.out),
                lines(FIRST_OF_STDERR, self.lines.err),
            ]
            .concat(),
        };
        let mut at_least = if is_done || has_shown { all.len() } else { 0 };
        if output != Output::Stderr {
            match self.program {
                // It can be killed before it has said it.
                Program::UntilTerm { .. } => all.extend(READY),
                Program::UntilEof { .. } => {
                    all.extend(lines(self.lines.out + 1, self.lines.input));
                    at_least = if is_done { all.len() } else { at_least };
                }
                _ => {}
            }
        }
        let due = Due { all, at_least };
        if self.streams.terminal {
            due.on_terminal()
        } else {
            due
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{End, ProcessPlan};

    fn plan(program: Program, lines: Lines) -> ProcessPlan {
        ProcessPlan {
            lines,
            ..ProcessPlan::plain(program, End::Itself)
        }
    }

    #[test]
    fn the_lines_are_written_and_then_the_rest_is_done() {
        let lines = Lines {
            out: 20,
            err: 3,
            input: 0,
        };
        let script = |program| plan(program, lines).arguments().pop().unwrap_or_default();
        assert_eq!(
            script(Program::UntilTerm { code: 9 }),
            "seq 1000001 1000003 >&2 & seq 1 20; wait; exec /bin/guest until-term 9"
        );
        let code = 7;
        let slow = script(Program::Exit { code, after_ms: 80 });
        assert!(
            slow.contains("seq 1 2; sleep 0.010000; seq 3 5; sleep"),
            "{slow}"
        );
        assert!(
            slow.ends_with("seq 18 20; sleep 0.010000; wait; exit 7"),
            "{slow}"
        );
    }

    #[test]
    fn of_what_was_killed_a_part_may_be_missing() {
        let lines = Lines {
            out: 10,
            err: 0,
            input: 0,
        };
        let due =
            |program, code, has_shown| plan(program, lines).due(Output::Stdout, code, has_shown);
        assert_eq!(due(Program::Sleep, Some(KILLED), false).at_least, 0);
        assert_eq!(due(Program::Sleep, Some(KILLED), true).at_least, 21);
        let exit = Program::Exit {
            code: 4,
            after_ms: 0,
        };
        assert_eq!(due(exit, Some(4), false).at_least, 21);
        assert_eq!(due(exit, Some(KILLED), false).at_least, 0);
        assert_eq!(due(Program::Missing, None, false), Due::default());
    }
}

//! The conformance suite of exit monitors: one suite for every backend. The verdict on how a process ended is its own parent's, who is
//! a program of ours that waits with `waitpid`; on when it ended, the clock around that. What a backend says it cannot know
//! ([`Guarantees`](embedshim_core::exit::Guarantees)) it may call unknown, and nothing else; a wrong status is never right.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod backends;
mod crowds;
mod identity;
mod neighbours;
mod old_kernels;
mod pins;
mod restarts;
mod shapes;
mod subject;

use std::process::ExitCode;

use backends::Kind;
use libtest_mimic::{Arguments, Trial};

/// One requirement, for every backend that it is about.
struct Check {
    name: &'static str,
    applies: fn(Kind) -> bool,
    run: fn(Kind),
}

/// Lists checks by their functions, which have a name that says what must hold.
macro_rules! checks {
    ($applies:expr; $($name:ident),+ $(,)?) => {
        [$($crate::Check {
            name: stringify!($name),
            applies: $applies,
            run: |kind| $crate::backends::block_on($name(kind)),
        }),+]
    };
}
pub(crate) use checks;

fn main() -> ExitCode {
    old_kernels::become_old();
    subject::raise_descriptor_limit();
    let arguments = Arguments::from_args();
    let checks = [
        shapes::checks().as_slice(),
        &crowds::checks(),
        &identity::checks(),
        &restarts::checks(),
        &pins::checks(),
        &neighbours::checks(),
    ]
    .concat();
    let mut trials = old_kernels::trials();
    for &kind in Kind::ALL {
        let missing = kind.why_not();
        for check in &checks {
            if (check.applies)(kind) {
                trials.push(trial(kind, check, missing.as_deref()));
            }
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trial(kind: Kind, check: &Check, missing: Option<&str>) -> Trial {
    let name = format!("{kind}::{}", check.name);
    if let Some(why) = missing {
        let name = format!("{name} (skipped, because {why})");
        return Trial::test(name, || Ok(())).with_ignored_flag(true);
    }
    let run = check.run;
    Trial::test(name, move || {
        run(kind);
        Ok(())
    })
}

impl Clone for Check {
    fn clone(&self) -> Self {
        Self { ..*self }
    }
}

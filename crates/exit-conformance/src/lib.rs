//! One test suite for every [`ExitMonitor`](exit_monitor::ExitMonitor).
//!
#![doc = include_str!("../README.md")]
//!
//! # Arguments and environment
//!
//! [`run`] takes the arguments of `cargo test` (a filter, `--skip`, `--list`). A check that fails
//! panics. Three environment variables describe a machine:
//!
//! - `EXIT_CONFORMANCE_PROGRAM`: the C program (`src/shapes.c`), compiled already, for a machine
//!   that has no copy of the build directory.
//! - `EXIT_CONFORMANCE_SLOW`: the machine is emulated; the crowds are a tenth.
//! - `EXIT_CONFORMANCE_NO_PTRACE`: ptrace(2) is forbidden here; the check that needs a foreign
//!   tracer has none.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a check fails by panicking"
)]

mod answers;
mod check;
mod crowds;
mod family;
mod identity;
mod neighbours;
mod restarts;
mod shapes;
mod subject;

use std::process::ExitCode;
use std::sync::Arc;

pub use libtest_mimic;
use libtest_mimic::{Arguments, Trial};

pub use family::{Family, Verdict, check_status, program};
pub use subject::{CAPACITY, Place, Subject, block_on, next};

/// Runs the suite on these subjects, as the arguments of this program say: the whole of a test
/// program's `main`.
pub fn run(subjects: &[Arc<dyn Subject>]) -> ExitCode {
    let arguments = Arguments::from_args();
    libtest_mimic::run(&arguments, trials(subjects)).exit_code()
}

/// The tests of these subjects, for a program that has more tests than these.
///
/// Each is named `SUBJECT::CHECK`. Those of a subject that cannot run here are listed as ignored,
/// with the reason. Raises this process's soft limit of open files to the hard one: thousands of
/// pidfds are open at once.
pub fn trials(subjects: &[Arc<dyn Subject>]) -> Vec<Trial> {
    family::raise_descriptor_limit();
    let checks = [
        shapes::checks().as_slice(),
        &crowds::checks(),
        &identity::checks(),
        &restarts::checks(),
        &neighbours::checks(),
    ]
    .concat();
    let mut trials = Vec::new();
    for subject in subjects {
        for check in checks.iter().filter(|check| (check.applies)(&**subject)) {
            let (run, its) = (check.run, Arc::clone(subject));
            trials.push(trial(subject, check.name, move || run(&its)));
        }
    }
    // It is about all of them at once.
    if let Some(first) = subjects.first() {
        let all = subjects.to_vec();
        trials.push(trial(
            first,
            "all_backends_in_one_process_agree",
            move || block_on(neighbours::all_backends_in_one_process_agree(&all)),
        ));
    }
    trials
}

/// One test of a subject, for what only this subject promises: ignored, with the reason, where the
/// subject cannot run.
pub fn trial(
    subject: &Arc<dyn Subject>,
    check: &str,
    run: impl FnOnce() + Send + 'static,
) -> Trial {
    let name = format!("{}::{check}", subject.name());
    if let Some(why) = subject.missing() {
        let name = format!("{name} (skipped, because {why})");
        return Trial::test(name, || Ok(())).with_ignored_flag(true);
    }
    Trial::test(name, move || {
        run();
        Ok(())
    })
}

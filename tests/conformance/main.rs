//! The conformance suite of exit monitors (crate `exit-conformance`), run with each of our
//! backends, and the checks that are about BPF's pins and about emulated kernels only.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod backends;
mod old_kernels;
mod pins;

use std::process::ExitCode;

use backends::Kind;
use exit_conformance::libtest_mimic::{self, Arguments};

fn main() -> ExitCode {
    old_kernels::become_old();
    let arguments = Arguments::from_args();
    let mut trials = old_kernels::trials();
    trials.extend(exit_conformance::trials(&Kind::subjects()));
    trials.extend(pins::trials());
    libtest_mimic::run(&arguments, trials).exit_code()
}

//! What containerd hands the launcher: a command line, and a message on standard input.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shim_api::fuzzing::bootstrap;

fuzz_target!(|input: (Vec<String>, Vec<u8>)| {
    bootstrap(&input.0, &input.1);
});

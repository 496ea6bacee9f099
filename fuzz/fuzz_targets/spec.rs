//! A bundle's `config.json`.
#![no_main]

use embedshim_core::fuzzing::spec;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    spec(text);
});

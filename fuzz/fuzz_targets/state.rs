//! What a daemon finds of its predecessor's: a record that was read is written again, and means the
//! same.
#![no_main]

use embedshim_core::fuzzing::task_record;
use libfuzzer_sys::fuzz_target;
use shim_api::fuzzing::{notes, outbox};

fuzz_target!(|text: &[u8]| {
    notes(text);
    outbox(text);
    if let Some(written) = task_record(text) {
        assert_eq!(task_record(&written).as_ref(), Some(&written));
    }
});

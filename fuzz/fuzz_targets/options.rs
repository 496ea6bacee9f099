//! Runtime options of every type, mount options, and where streams go.
#![no_main]

use embedshim_core::fuzzing::{mount_options, streams};
use embedshim_core::rootfs::Mount;
use embedshim_core::stdio::StdioPaths;
use libfuzzer_sys::fuzz_target;
use shim_api::fuzzing::options;

const TYPES: [&str; 4] = [
    "containerd.runc.v1.Options",
    "runtimeoptions.v1.Options",
    "containerd.runc.v1.CheckpointOptions",
    "types.containerd.io/unknown",
];

type Input = (u8, Vec<u8>, String, Vec<String>, [String; 3], bool);

fuzz_target!(|input: Input| {
    let (number, value, kind, words, [stdin, stdout, stderr], terminal) = input;
    options(TYPES[usize::from(number) % TYPES.len()], &value);
    mount_options(&Mount {
        kind,
        options: words,
        ..Mount::default()
    });
    streams(&StdioPaths {
        stdin,
        stdout,
        stderr,
        terminal,
    });
});

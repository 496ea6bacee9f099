//! Exits recorded in the kernel: an eBPF program on `sched_process_exit` writes the wait status and the time of every
//! watched process into a map. Program and maps are pinned, so recording goes on while no process of ours is alive.
//! Says how and when a process ended; *that* it is dead is told by the monitor it wraps.
//!
//! Linux 5.2 and newer (tested: 5.10 and newer) with BTF (`CONFIG_DEBUG_INFO_BTF`, or a file with it); pins since 5.7. CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN; a bpffs for the pins.

#![allow(clippy::doc_markdown, reason = "capability names are words here")]

mod loader;
mod maps;
mod monitor;
mod pins;
mod probe;
mod program;

pub use loader::Loader;
pub use monitor::{BpfConfig, BpfMonitor};
pub use pins::pin_dir_for;
pub use probe::probe;
pub use program::{Loading, OpenError};

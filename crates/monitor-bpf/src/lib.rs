//! Exits recorded in the kernel: an eBPF program on `sched_process_exit` writes the wait status and
//! the time of every watched process into a map. Program and maps are pinned, so recording goes on
//! while no process of ours is alive. Says how and when a process ended; *that* it is dead is told
//! by the monitor it wraps.
//!
//! Linux 5.2 and newer (tested: 5.10 and newer) with BTF (`CONFIG_DEBUG_INFO_BTF`, or a file with
//! it); pins since 5.7. CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN; a bpffs for the pins.
//!
//! ```no_run
//! use std::path::Path;
//! use std::sync::Arc;
//!
//! use exit_monitor::{ExitMonitor, Survives};
//! use monitor_bpf::{BpfConfig, BpfMonitor, Loading};
//! use monitor_pidfd::PidfdMonitor;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = BpfConfig {
//!     // One directory for each state directory: a successor finds by it what this one has pinned.
//!     pin_dir: monitor_bpf::pin_dir_for(Path::new("/run/mine")),
//!     capacity: 1024,
//!     loading: Loading::default(),
//! };
//! let monitor = BpfMonitor::open(&config, Arc::new(PidfdMonitor::new()?))?;
//! assert_eq!(monitor.guarantees().survives, Survives::Everything);
//! // Dropped, it leaves the program to its successor. If there is to be none:
//! drop(monitor);
//! monitor_bpf::remove_pins(&config.pin_dir)?;
//! # Ok(())
//! # }
//! ```

#![allow(clippy::doc_markdown, reason = "capability names are words here")]

mod clocks;
mod loader;
mod maps;
mod monitor;
mod object;
mod pins;
mod probe;
mod program;
mod proof;
mod sys;

pub use loader::Loader;
pub use monitor::{BpfConfig, BpfMonitor};
pub use pins::{pin_dir_for, remove_pins};
pub use probe::probe;
pub use program::{Loading, OpenError};

//! Exits by ptrace, the last resort: one tracer thread seizes processes that are not our children,
//! where neither BPF nor pidfds tell how those end. Decorates the monitor that tells *that* a
//! process is dead.
//!
//! It has a price: a traced process cannot be debugged by another program, each of its signals and
//! new threads takes two context switches more, and nothing is known of an exit while no tracer
//! runs. Our own children are never traced: `waitid` tells.
//!
//! Linux 3.4; CAP_SYS_PTRACE; yama's `ptrace_scope` below 3.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use exit_monitor::{Exactness, ExitMonitor};
//! use monitor_pidfd::PidfdMonitor;
//! use monitor_ptrace::PtraceMonitor;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let monitor = PtraceMonitor::open(Arc::new(PidfdMonitor::new()?))?;
//! assert_eq!(monitor.guarantees().others, Exactness::Always);
//! # Ok(())
//! # }
//! ```

#![allow(clippy::doc_markdown, reason = "capability names are words here")]

mod monitor;
mod probe;
mod sys;
mod tracer;

pub use monitor::PtraceMonitor;
pub use probe::probe;

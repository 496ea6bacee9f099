//! How a process ends, told to a program that is not its parent and that may be restarted
//! meanwhile.
//!
//! This crate has the contract ([`ExitMonitor`]), the identity of a process ([`process::Process`]:
//! a pidfd, and what distinguishes it from a later process with the same number), what is known of
//! an end ([`ExitRecord`], with its [`Evidence`]) and the choice between backends by what they
//! [guarantee](Guarantees) on a kernel ([`Report`]). It never learns of an exit itself: the crates
//! `monitor-pidfd`, `monitor-bpf` and `monitor-ptrace` do, and any other type that implements the
//! trait.
//!
//! ```
//! use std::process::{Command, Stdio};
//! use std::sync::Arc;
//!
//! use exit_monitor::process::Process;
//! use exit_monitor::{ExitMonitor, ExitStatus, Watched};
//! use monitor_pidfd::PidfdMonitor;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let monitor = PidfdMonitor::new()?;
//! // Any process; this one is a child, so that the example has one.
//! let child = Command::new("sh").args(["-c", "read line; exit 7"]).stdin(Stdio::piped()).spawn()?;
//! let process = Arc::new(Process::open(i32::try_from(child.id())?)?);
//! assert_eq!(monitor.watch(Arc::clone(&process)).await?, Watched::Armed);
//!
//! drop(child.stdin); // and so it ends
//! let mut exits = Vec::new();
//! monitor.next_exits(&mut exits).await?;
//! assert_eq!(exits[0].process, process.identity());
//! assert_eq!(exits[0].status, ExitStatus::Exited(7));
//! # Ok(())
//! # }
//! ```

pub mod process;

mod clock;
mod guarantees;
mod monitor;
mod probe;
mod record;
mod report;
mod status;
mod sys;
mod table;

pub use clock::BootTime;
pub use guarantees::{Exactness, Guarantees, Survives};
pub use monitor::{Adopted, Backend, ExitMonitor, Known, WatchError, Watched};
pub use probe::{Availability, Feature, FeatureState};
pub use record::{Evidence, ExitRecord};
pub use report::{Choice, NoBackend, Place, Policy, Promise, Report};
pub use status::{ExitStatus, UnknownReason};

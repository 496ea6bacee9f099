//! Exits by pidfd: readiness for every process by one epoll instance, the status by `waitid` for
//! children and by what the kernel still knows for others. Complete on Linux 6.15 and newer while
//! the pidfds are held; before that exact for children only. Other backends build on its readiness.
//!
//! ```
//! use std::process::Command;
//! use std::sync::Arc;
//!
//! use exit_monitor::{Evidence, ExitMonitor, Watched};
//! use exit_monitor::process::Process;
//! use monitor_pidfd::PidfdMonitor;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let monitor = PidfdMonitor::new()?;
//! let child = Command::new("sh").args(["-c", "kill -9 $$"]).spawn()?;
//! let process = Process::open(i32::try_from(child.id())?)?;
//! let mut exits = Vec::new();
//! match monitor.watch(Arc::new(process)).await? {
//!     Watched::Ended(record) => exits.push(record), // it was quicker
//!     Watched::Armed => monitor.next_exits(&mut exits).await?,
//! }
//! assert_eq!(exits[0].status.code(), 128 + 9);
//! // It was our child: the monitor has waited for it, and `Child::wait` would find no child.
//! assert_eq!(exits[0].evidence, Evidence::Wait);
//! # Ok(())
//! # }
//! ```

mod monitor;
mod probe;
mod status;
mod sys;

pub use monitor::PidfdMonitor;
pub use probe::probe;

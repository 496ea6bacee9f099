//! Runs OCI containers without a process per container, and never loses an exit.
//!
//! The core of embedshim, usable without containerd and without the daemon:
//!
//! - An [`ExitMonitor`](exit::ExitMonitor) from one of the `monitor-*` crates tells how processes
//!   end, whatever their parent is: useful by itself, for any process that a
//!   [`Process`](process::Process) can be opened of.
//! - [`Node`](task::Node) creates, starts, execs, signals and deletes containers through an OCI
//!   runtime; how their processes end, a monitor tells it. What must survive this process is in its
//!   state directory.
//!
//! Nothing is global: a process may have as many monitors and nodes as it likes, and an
//! environment, signal handlers and children of its own. What concerns the whole process (being a
//! child subreaper, a limit of descriptors, a lock on the state directory) is left to the program.
//! Needed are Linux, a tokio runtime with I/O and time, and that nothing else in the process reaps
//! the children of others: no ignored `SIGCHLD`, no `waitpid(-1)`.
//!
//! How a process ends that need not be our child:
//!
//! ```
//! use std::process::{Command, Stdio};
//! use std::sync::Arc;
//!
//! use embedshim_core::exit::{ExitMonitor, ExitStatus, Watched};
//! use embedshim_core::process::Process;
//! use monitor_pidfd::PidfdMonitor;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let monitor = PidfdMonitor::new()?;
//! // Any process; this one is ours, so that the example has one.
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
//!
//! A container, with a monitor that may be of any kind. That the program is killed before the end
//! of `wait` changes nothing but who waits: the next node on this state directory answers it (if
//! the monitor promises [`Survives::Everything`](exit::Survives::Everything)).
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use embedshim_core::exit::ExitMonitor;
//! use embedshim_core::id::{ProcessKey, TaskKey};
//! use embedshim_core::stdio::StdioPaths;
//! use embedshim_core::task::{CreateTask, Exit, Node, NodeConfig, RuntimeOptions};
//!
//! # async fn run(monitor: Arc<dyn ExitMonitor>) -> Result<Exit, Box<dyn std::error::Error>> {
//! let node = Node::open(NodeConfig::new("/run/mine"), monitor).await?;
//! let task = TaskKey { namespace: "mine".parse()?, id: "c1".parse()? };
//! node.create(CreateTask {
//!     key: task.clone(),
//!     bundle: "/bundles/c1".into(),
//!     rootfs: Vec::new(), // it is in the bundle
//!     stdio: StdioPaths::default(),
//!     runtime: RuntimeOptions::default(),
//!     checkpoint: None,
//!     owner: String::new(),
//! })
//! .await?;
//! let init = ProcessKey { task, exec: None };
//! node.start(&init).await?;
//! let exit = node.wait(&init).await?;
//! node.delete(&init).await?;
//! # Ok(exit)
//! # }
//! ```
//!
//! `examples/` has whole programs: `watch`, `bundle` and `probe`, which chooses a backend.

pub mod cgroup;
pub mod clock;
pub mod event;
#[doc(hidden)]
pub mod failpoint;
pub mod fdstore;
pub mod id;
pub mod rootfs;
pub mod stdio;
pub mod task;

mod blocking;
mod bundle;
mod child_context;
mod error;
#[cfg(fuzzing)]
pub mod fuzzing;
mod mountinfo;
mod program;
mod reaper;
mod runtime;
mod spec;
mod sys;

pub use exit_monitor as exit;
pub use exit_monitor::process;

pub use child_context::{ChildContext, Inherited};
pub use error::{Error, ErrorKind, chain};

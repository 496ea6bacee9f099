//! Runs OCI containers without a process per container, and never loses an exit.
//!
#![doc = include_str!("../README.md")]
//!
//! # What is here
//!
//! - [`Node`](task::Node) creates, starts, execs, signals and deletes containers. What has to
//!   survive this process is in its state directory.
//! - An [`ExitMonitor`](exit::ExitMonitor), from one of the `monitor-*` crates, tells the node how
//!   processes end. It is useful alone, for any [`Process`](process::Process). A status is never
//!   lost if it promises [`Survives::Everything`](exit::Survives::Everything).
//! - [`Sandboxes`](sandbox::Sandboxes) has what the containers of a pod share, without a process
//!   unless they share their processes.
//!
//! Nothing is global: a process may have any number of monitors and nodes, and an environment,
//! signal handlers and children of its own. What concerns the whole process (being a child
//! subreaper, a limit of descriptors, a lock on the state directory) is left to the program. The
//! rest of the program must leave `SIGCHLD` at its default or handle it, and must not call
//! `waitpid(-1)`.

pub mod cgroup;
pub mod clock;
pub mod event;
#[doc(hidden)]
pub mod failpoint;
pub mod fdstore;
pub mod id;
pub mod rootfs;
pub mod sandbox;
pub mod stdio;
pub mod task;

mod blocking;
mod bundle;
mod child_context;
mod error;
#[cfg(fuzzing)]
pub mod fuzzing;
mod kernel_file;
mod mountinfo;
mod observer;
mod program;
mod reaper;
mod records;
mod runtime;
mod spec;
mod sys;
mod user_namespace;

pub use exit_monitor as exit;
pub use exit_monitor::process;

pub use child_context::{ChildContext, Inherited};
pub use error::{Error, ErrorKind, chain};
pub use observer::Observer;
#[cfg(feature = "spans")]
pub use runtime::caller::{CallObserver, EndedCall, observe_calls};

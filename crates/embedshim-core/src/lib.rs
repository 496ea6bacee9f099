//! Runs OCI containers without a process per container, and never loses an exit.
//!
//! The core of embedshim, usable without containerd: [`task::Node`] creates, starts, execs, signals and deletes
//! containers through an OCI runtime; an [`exit::ExitMonitor`] from one of the `monitor-*` crates tells how their
//! processes end, whoever their parent is; what must survive this process is in its state directory.
//!
//! Who embeds it composes three things: a monitor, a [`task::NodeConfig`], and a consumer of
//! [`task::Node::next_event`]. Being a child subreaper is recommended.

pub mod cgroup;
pub mod clock;
pub mod descriptor;
pub mod error;
pub mod event;
pub mod exit;
pub mod id;
pub mod orphans;
pub mod process;
pub mod rootfs;
pub mod runtime;
pub mod spec;
pub mod stdio;
pub mod task;

#[cfg(fuzzing)]
pub mod fuzzing;
mod store;
mod sys;

pub use error::{Error, ErrorKind};

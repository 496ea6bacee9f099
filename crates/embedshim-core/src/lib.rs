//! Runs OCI containers without a process per container, and never loses an exit.

pub mod cgroup;
pub mod clock;
pub mod error;
pub mod event;
pub mod exit;
pub mod id;
pub mod process;
pub mod rootfs;
pub mod stdio;
pub mod task;

pub use error::{Error, ErrorKind};

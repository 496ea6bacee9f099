//! Exits that an eBPF program records in the kernel. Owns [`BpfMonitor`], its pins and its
//! [`probe`]; never says *that* a process is dead.
//!
#![doc = include_str!("../README.md")]
#![allow(clippy::doc_markdown, reason = "capability names are words here")]

mod all;
mod clocks;
mod loader;
mod maps;
mod monitor;
mod object;
mod pinned;
mod pins;
mod probe;
mod program;
mod proof;
mod sys;

pub use all::{AllExits, SeenExit};
pub use loader::Loader;
pub use monitor::{BpfConfig, BpfMonitor};
pub use pinned::{Pinned, pinned};
pub use pins::{note_state_dir, pin_dir_for, remove_pins};
pub use probe::probe;
pub use program::{Loading, OpenError};

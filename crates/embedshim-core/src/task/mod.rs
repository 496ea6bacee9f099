//! Tasks: containers in execution, their processes, and what can be done with them.
//! [`Node`] is the whole interface; everything a task does goes through it.

mod container;
mod control;
mod creation;
mod deletion;
mod detached;
mod errand;
mod execution;
mod exits;
mod half_created;
mod node;
mod process;
mod request;
mod restoration;
mod resumption;
mod shared;
mod state;
mod unreported;

pub use errand::{Errand, RequestId, Witness};
pub use node::{Node, NodeConfig};
pub use request::{
    CheckpointTask, Cleaned, CreateTask, Deleted, ExecProcess, Exit, ProcessEntry, ProcessSnapshot,
    ProcessStatus, RuntimeOptions,
};
pub(crate) use state::Phase;

pub use crate::orphans::Awaited;
pub use crate::store::{BundleId, discard_record};

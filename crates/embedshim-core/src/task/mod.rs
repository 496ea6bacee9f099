//! Tasks: containers in execution, their processes, and what can be done with them.
//! [`Node`] is the whole interface; everything a task does goes through it.

mod api;
mod context;
mod detached;
mod engine;
mod exits;
mod launch;
mod lifecycle;
mod node;
mod ops;
mod process;
mod recovery;
mod store;
#[expect(
    clippy::module_inception,
    reason = "one task, in the folder of all that is done with tasks"
)]
mod task;

pub use api::{
    CheckpointTask, Cleaned, CreateTask, Deleted, ExecProcess, Exit, ProcessEntry, ProcessSnapshot,
    ProcessStatus, RuntimeOptions,
};
pub use context::{Errand, RequestId, Witness};
pub(crate) use lifecycle::Phase;
pub use node::{Node, NodeConfig};

pub use crate::reaper::Awaited;
pub use crate::task::store::{BundleId, discard_record};

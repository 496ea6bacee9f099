//! Tasks: containers in execution, their processes, and what can be done with them.
//! [`Node`] is the whole interface; everything a task does goes through it.

mod node;
mod request;

pub use node::Node;
pub use request::{
    Cleaned, CreateTask, Deleted, ExecProcess, Exit, ProcessEntry, ProcessSnapshot, ProcessStatus,
    RuntimeOptions,
};

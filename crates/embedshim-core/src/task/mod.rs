//! Tasks: containers in execution, their processes, and what can be done with them.
//! [`Node`] is the whole interface; everything that a task does goes through it.
//!
//! # The life of a process
//!
//! ```text
//!             Begin               Start             Release
//!   Created ----------> Starting --------> Started ---------> Running
//!      ^                 |  |  ^                               |   ^
//!      |     Release     |  |  |                        Freeze |   | Thawed
//!      +-----------------+  |  | Begin, unless                 v   |
//!                      Fail |  | it may have run            Pausing+
//!                           v  |                               |   ^
//!                       StartFailed                     Frozen |   | Thawed
//!                                                              v   |
//!                                                            Paused+
//!
//!   Created, Starting, Started, Running, Pausing, Paused -- End --> Ended -- Publish --> Stopped
//! ```
//!
//! - `Starting` and `Started` belong to the operation that began. An exit that is reported
//!   meanwhile waits in them for `Release`: it comes after the operation's event and record.
//! - `Ended` knows the exit, and clients do not: it is visible as `Stopped` when it is durable.
//! - Clients see `Starting` and `StartFailed` as created, `Started` as running, `Ended` as what it
//!   was before.
//!
//! Only `Lifecycle::apply` changes it. Who asks for that:
//!
//! | transition | by |
//! | --- | --- |
//! | `Begin`, `Start`, `Release`, `Fail`, `Unmake` | `ops::create`, `ops::start`; `recovery` |
//! | `Freeze`, `Frozen`, `Thawed` | `ops::pause`; `recovery` |
//! | `Report`, `End`, `Publish` | `exits`; `Report` also `Engine::watch` |
//!
//! # What imports what
//!
//! `node` → `engine` with its methods in `ops`, `exits`, `recovery`, `launch`, `teardown` →
//! `registry`, `store` → `task` → `process` → `lifecycle`. Nothing below the engine writes a record
//! or emits an event: it gives them to its caller.

mod api;
mod config;
mod context;
mod cut_short;
mod engine;
mod exec_files;
mod exit_order;
mod exits;
mod launch;
mod lifecycle;
mod node;
mod ops;
mod overview;
mod process;
mod record;
mod recovery;
mod registry;
mod restores;
mod standing;
mod store;
#[expect(
    clippy::module_inception,
    reason = "one task, in the folder of all that is done with tasks"
)]
mod task;
mod teardown;
mod unreported;

pub use api::{
    CheckpointTask, Cleaned, CreateTask, Deleted, ExecProcess, Exit, ProcessEntry, ProcessSnapshot,
    ProcessStatus,
};
pub use config::NodeConfig;
pub use context::{DeleteObserver, RequestContext, RequestId};
pub use node::Node;
pub use overview::{BlockedStream, ProcessOverview, TaskOverview};

pub use crate::bundle::BundleId;
pub use crate::reaper::Awaited;
pub use crate::runtime::{RuntimeCall, RuntimeOptions};
#[cfg(fuzzing)]
pub(crate) use record::TaskRecord;
pub(crate) use store::boot_id;
pub use store::discard_record;

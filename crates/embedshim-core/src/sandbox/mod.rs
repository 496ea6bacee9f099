//! What the containers of a pod share, without a process that holds it: namespaces that are pinned,
//! files for `/etc`, shared memory. A pid namespace alone needs a process, its init. [`Sandboxes`]
//! is the facade; containers are tasks, which join what is pinned. Owns the order of these steps
//! and their undoing; never runs a container.
//!
//! ```text
//! Created ── start ──► Ready ── stop ──► Stopped ── remove ──► gone
//!    └──── remove ──────┴───────────────────────────────────►┘
//! ```
//!
//! Created is in memory alone. From the start on there is a record: `Starting` is undone by a
//! successor, `Stopping` and `Removing` are finished.

mod api;
mod builder;
mod error;
mod holder;
mod isolation;
mod namespaces;
mod observer;
mod overview;
mod place;
mod record;
mod recovery;
#[expect(
    clippy::module_inception,
    reason = "a pod is called a sandbox, and so is the module of all"
)]
mod sandbox;
mod sandboxes;
mod spec;
mod store;
mod sysctls;
mod users;

pub use api::{
    CreateSandbox, Dns, Ended, Network, Processes, Reach, SandboxConfig, SandboxSnapshot,
};
pub use error::SandboxError;
pub use observer::{SandboxChange, SandboxObserver};
pub use overview::{NamespaceOwner, SandboxNamespace, SandboxOverview, SandboxState};
pub use sandboxes::Sandboxes;
pub use users::{IdRange, Users};

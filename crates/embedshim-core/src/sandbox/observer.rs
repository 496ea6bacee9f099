//! [`SandboxObserver`]: hears of what becomes of sandboxes. Owns the shapes; keeps nothing.

use std::fmt;
use std::time::SystemTime;

use crate::id::SandboxKey;

/// Hears of what becomes of sandboxes, at the moment in which it is so.
///
/// Called by the runtime's thread, so it must not wait. What it hears is for people: it is told
/// again of nothing, also not after a restart.
pub trait SandboxObserver: fmt::Debug + Send + Sync {
    /// This has become of the sandbox.
    fn changed(&self, key: &SandboxKey, change: SandboxChange);
}

/// What has become of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SandboxChange {
    /// Containers can be started in it.
    Started,
    /// It was stopped, or it was found out that its namespaces are lost.
    Ended {
        /// 0 after a stop, 255 if its namespaces were lost.
        code: u32,
        /// When.
        at: SystemTime,
    },
    /// Everything of it is removed.
    Removed,
}

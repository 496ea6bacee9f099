//! [`Observer`]: hears of what a node does, to count it. Owns the shape; counts nothing.

use std::fmt;
use std::time::Duration;

use crate::exit::ExitRecord;

/// Hears of what a node does, at the moment in which it is done.
///
/// Called by any thread, the runtime's among them, so it must not wait. What it hears is for
/// statistics: it is told again of nothing, also not after a restart.
pub trait Observer: fmt::Debug + Send + Sync {
    /// The exit of a container's process is known. An exit that a predecessor has recorded and not
    /// published is heard of once more.
    fn exited(&self, record: &ExitRecord, is_init: bool);

    /// A call of an OCI runtime is over. `operation` is the runtime's command, such as `create`.
    fn runtime_called(&self, operation: &'static str, took: Duration, has_succeeded: bool);
}

//! How processes end and who can tell: the exit vocabulary of the whole project.
//! Owns [`ExitStatus`], [`ExitRecord`], the [`ExitMonitor`] trait and the choice between backends;
//! it never learns of an exit itself, that is what the `monitor-*` crates are for.

mod monitor;
mod probe;
mod record;
mod selection;
mod status;

pub use monitor::{
    Adopted, Backend, ExitMonitor, Guarantees, Known, Survives, WatchError, Watched,
};
pub use probe::{Availability, Feature, FeatureState};
pub use record::{Evidence, ExitRecord};
pub use selection::{Choice, NoBackend, Policy, Rejected, choose};
pub use status::{ExitStatus, UnknownReason};

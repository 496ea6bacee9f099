//! How processes end and who can tell: the exit vocabulary of the whole project.
//! Owns [`ExitStatus`], [`ExitRecord`], the [`ExitMonitor`] trait and the choice between backends;
//! it never learns of an exit itself, that is what the `monitor-*` crates are for.

mod guarantees;
mod monitor;
mod probe;
mod record;
mod report;
mod status;
mod table;

pub use guarantees::{Exactness, Guarantees, Survives};
pub use monitor::{Adopted, Backend, ExitMonitor, Known, WatchError, Watched};
pub use probe::{Availability, Feature, FeatureState};
pub use record::{Evidence, ExitRecord};
pub use report::{Choice, NoBackend, Place, Policy, Promise, Report};
pub use status::{ExitStatus, UnknownReason};

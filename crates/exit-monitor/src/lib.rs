//! How processes end, reported to a program that is not their parent and may be restarted
//! meanwhile.
//!
#![doc = include_str!("../README.md")]
//!
//! # What is here
//!
//! - [`ExitMonitor`]: the contract. A monitor learns of exits; this crate never does.
//! - [`process::Process`]: a pidfd and what distinguishes the process from a later one of its pid.
//! - [`ExitRecord`]: what is known of an end, with its [`Evidence`].
//! - [`Guarantees`] and [`Report`]: what backends promise on a kernel, and the choice between them.

pub mod process;

mod clock;
mod guarantees;
mod monitor;
mod probe;
mod record;
mod report;
mod status;
mod sys;
mod table;

pub use clock::BootTime;
pub use guarantees::{Exactness, Guarantees, Survives};
pub use monitor::{Adopted, Backend, ExitMonitor, Known, WatchError, Watched};
pub use probe::{Availability, Feature, FeatureState};
pub use record::{Evidence, ExitRecord};
pub use report::{Choice, Durability, NoBackend, Place, Policy, Report};
pub use status::{ExitStatus, UnknownReason};

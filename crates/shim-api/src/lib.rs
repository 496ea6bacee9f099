//! What containerd sees: a ttrpc server with the Task service of shims, the launcher's side of the
//! bootstrap, and the forwarding of events. Everything about tasks themselves is the core's; this
//! crate translates.
//!
//! | module | owns |
//! | --- | --- |
//! | [`server`] | connections that outlive the daemon: framing, calls, journals |
//! | [`services`] | what a call means: the Task service, and the launcher's |
//! | [`events`] | the events that containerd has not acknowledged |
//! | `appendlog` | the files of journals and events |
//! | [`bootstrap`] | the launcher, which containerd executes; no async runtime |

pub mod bootstrap;
pub mod bundle;
pub mod events;
pub mod frame;
pub mod server;
pub mod services;
pub mod socket;
pub mod state_dir;
pub mod status;

#[cfg(fuzzing)]
pub mod fuzzing;

mod appendlog;

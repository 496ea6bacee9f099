//! The append log: the one kind of file for the journals of connections and the events of each
//! containerd. Never knows what an entry means, and never decides which entries are still needed:
//! that is its users', `server::journal` and `events::log`.
//!
//! A log is a header of fixed size, which is overwritten in place, and entries behind it. The state
//! directory is on tmpfs, so a write takes microseconds and is done in place.

mod framing;
mod log;
mod recovery;
#[cfg(test)]
pub(crate) mod tests;

pub(crate) use framing::{DoubleHead, First, Framing, Marked, Tag, open_seal, seal};
pub(crate) use log::Log;
pub(crate) use recovery::{Found, Piece, Pieces, discard_drafts, is_log, set_aside};

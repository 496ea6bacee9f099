//! Exits by a tracer thread. Owns [`PtraceMonitor`] and its [`probe`]; never traces children.
//!
#![doc = include_str!("../README.md")]
#![allow(clippy::doc_markdown, reason = "capability names are words here")]

mod monitor;
mod probe;
mod sys;
mod tracer;

pub use monitor::PtraceMonitor;
pub use probe::probe;

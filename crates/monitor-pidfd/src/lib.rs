//! Exits by pidfd. Owns [`PidfdMonitor`] and its [`probe`]; other backends build on its readiness.
//!
#![doc = include_str!("../README.md")]

mod monitor;
mod probe;
mod status;
mod sys;

pub use monitor::PidfdMonitor;
pub use probe::probe;

//! The operations on tasks and their processes.

pub(super) mod delete;
pub(super) mod kill;
pub(super) mod start;

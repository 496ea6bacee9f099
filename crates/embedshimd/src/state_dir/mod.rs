//! The state directory as files: which process works on it (lock files and claims), which file is
//! at a path, and what has to be recreated when files were removed. Knows neither containers nor
//! connections: what is recreated, and how, comes from the daemon.

pub(crate) mod claim;
pub(crate) mod durable;
pub(crate) mod file_id;
pub(crate) mod lives;
pub(crate) mod lock;

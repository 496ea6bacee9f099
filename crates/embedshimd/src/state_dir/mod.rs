//! The files of a state directory that say which process works on it: its lock files and the names
//! of daemon and keeper in the kernel.

pub(crate) mod claim;
pub(crate) mod lock;

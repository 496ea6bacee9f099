//! What clients can ask for, each operation a method of [`Engine`](super::engine::Engine). An
//! operation writes and emits through the engine only, and changes a process only by transitions of
//! its [`Lifecycle`](super::lifecycle::Lifecycle).

mod checkpoint;
mod cleanup;
mod create;
mod delete;
mod exec;
pub(super) mod kill;
mod pause;
mod start;

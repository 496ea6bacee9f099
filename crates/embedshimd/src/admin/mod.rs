//! What an operator can ask a running daemon: documents by HTTP on `STATE_DIR/admin.sock`, answered
//! by threads of their own, so that an answer comes while everything else is busy. Owns the socket,
//! the documents and what is refused; changes nothing in the daemon.
//!
//! | path | document |
//! | --- | --- |
//! | `/v1/status` | the daemon, and what needs attention |
//! | `/v1/tasks` | all tasks |
//! | `/v1/tasks/NAMESPACE/ID` | one task |
//! | `/v1/sandboxes` | all sandboxes: pods without a pause container |
//! | `/v1/sandboxes/NAMESPACE/ID` | one sandbox |
//! | `/v1/events` | what has happened since this daemon began, the last of it |
//! | `/v1/events/follow`, with `/NUMBER` | each event when it happens, a line each, without end |
//! | `/metrics` | what is counted, for Prometheus; by TCP as well, if that is configured |
//! | `/healthz` | status 200 if nothing needs attention, otherwise 503; by TCP as well |
//!
//! All below `/v1` are JSON. A field that a later version adds is no new version of the path; a
//! field that changes its meaning is.

pub(crate) mod client;
pub(crate) mod documents;
mod follow;
mod health;
pub(crate) mod http;
mod routes;
mod sandboxes;
pub(crate) mod scrape;
mod server;
pub(crate) mod textfile;
pub(crate) mod view;
mod workers;

pub(crate) use server::Admin;

//! What containerd's CRI sees of pods: `containerd.services.sandbox.v1.Controller` over gRPC. What
//! a sandbox is made of is the core's; this crate translates, and owns the connections.
//!
//! | module | owns |
//! | --- | --- |
//! | [`Server`] | listening, connections, leaving |
//! | `grpc` | gRPC's unary calls over HTTP/2, by the `h2` crate |
//! | `controller` | what each call means |
//! | `known` | what containerd's own store of sandboxes has |
//! | `request` | the way from a pod's configuration to the core's request; what is refused |
//!
//! gRPC by hand and not by `tonic`: nine unary calls of one client need 200 lines, and `h2` adds
//! 337 kB and 16 crates to a program, `tonic` 878 kB and 65 (docs/decisions.md).

mod controller;
mod grpc;
mod known;
mod messages;
mod request;
mod server;

pub use controller::{Controller, VERSION};
pub use grpc::{Call, Code, Handler, Status};
pub use known::known_to_containerd;
pub use server::Server;

//! What the end-to-end tests share: the stage they play on, and the trace a container may leave.
//! The tests themselves are in `end_to_end/`.

mod collector;
mod controller;
mod cri;
mod crowd;
mod docker;
mod ends;
mod footprint;
mod listener;
mod nri;
mod shim;
mod stage;
mod streaming;

pub use collector::{Collector, SentSpan};
pub use controller::Controller;
pub use cri::{Cri, Executed, Namespaces, Pod};
pub use crowd::{Crowd, Kind, Stored, raise_open_files};
pub use docker::{Docker, DockerSetup, runtime_path, runtime_type};
pub use ends::{Reader, ensure_counted, on_a_terminal, writer};
pub use footprint::Footprint;
pub use listener::{Heard, Listener};
pub use nri::{NriPlugin, VARIABLE};
pub use shim::{Bundle, Shim, binary_name, options, write_program};
pub use stage::{Scope, Stage, Test, docker};
pub use streaming::Streaming;

//! The entrances of the fuzz targets, compiled for them alone: readers of data from outside,
//! without the effects of what was read.

use std::ffi::OsString;
use std::sync::Arc;

use containerd_shim_protos::api::CreateTaskRequest;
use embedshim_core::rootfs::Mount;
use embedshim_core::stdio::StdioPaths;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use tokio::net::UnixStream;

use crate::bundle::BundleNote;
use crate::server::{self, Handler};
use crate::services::launcher::{CleanupRequest, CleanupResponse};
use crate::services::{create, options};
use crate::{bootstrap, events};

/// Serves one connection to its end.
pub async fn converse<H: Handler>(stream: UnixStream, handler: Arc<H>) -> bool {
    server::converse(stream, handler).await.is_ok()
}

/// Reads a `Create` request: its mounts and its streams.
pub fn create(payload: &[u8]) -> Option<(Vec<Mount>, StdioPaths)> {
    let request = CreateTaskRequest::parse_from_bytes(payload).ok()?;
    options::decode(request.options.as_ref()).ok()?;
    let mounts = request.rootfs.into_iter().map(create::mount);
    let streams = StdioPaths {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        terminal: request.terminal,
    };
    Some((mounts.collect(), streams))
}

/// Reads runtime and checkpoint options, and returns whether either was understood.
pub fn options(type_url: &str, value: &[u8]) -> bool {
    let any = Any {
        type_url: type_url.into(),
        value: value.into(),
        ..Any::default()
    };
    options::decode(Some(&any)).is_ok() || options::decode_checkpoint(Some(&any)).is_ok()
}

/// Reads the launcher's command line and what `start` and `-info` get on standard input.
pub fn bootstrap(arguments: &[String], stdin: &[u8]) -> bool {
    bootstrap::understands(arguments.iter().map(OsString::from), stdin)
}

/// Reads the launcher's note in a bundle, and the messages between launcher and daemon.
pub fn notes(text: &[u8]) -> bool {
    serde_json::from_slice::<BundleNote>(text).is_ok()
        || serde_json::from_slice::<CleanupRequest>(text).is_ok()
        || serde_json::from_slice::<CleanupResponse>(text).is_ok_and(|response| match response {
            CleanupResponse::Removed(removed) => removed.exited_at().elapsed().is_ok(),
            _ => true,
        })
}

/// Reads an outbox that a predecessor left, and returns whether it is one.
pub fn outbox(bytes: &[u8]) -> bool {
    events::understands(bytes)
}

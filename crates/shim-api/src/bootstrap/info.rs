//! `-info` and `-v`: what containerd 2.x asks about a runtime before it has a container. Answered
//! without the daemon.

use std::process::Command;
use std::time::Duration;

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use embedshim_core::task::RuntimeOptions;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use super::failure::Failure;
use super::runtime;
use crate::services::options;

/// The runtime's name, as in containerd's configuration.
const NAME: &str = "io.containerd.embed.v1";
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";
const LIMIT: Duration = Duration::from_secs(5);

/// Returns the message for standard output; `stdin` has the runtime's options as an `Any`, or
/// nothing.
pub(super) fn run(stdin: &[u8]) -> Result<Vec<u8>, Failure> {
    let (asked, runtime) = options_of(stdin)?;
    let version = RuntimeVersion {
        version: env!("CARGO_PKG_VERSION").into(),
        ..RuntimeVersion::default()
    };
    let info = RuntimeInfo {
        name: NAME.into(),
        version: MessageField::some(version),
        options: if asked.type_url.is_empty() {
            MessageField::none()
        } else {
            MessageField::some(asked)
        },
        features: features(runtime.binary_or_default()).into(),
        ..RuntimeInfo::default()
    };
    info.write_to_bytes()
        .map_err(|error| Failure::Streams(error.into()))
}

pub(super) fn options_of(stdin: &[u8]) -> Result<(Any, RuntimeOptions), Failure> {
    let asked = Any::parse_from_bytes(stdin)
        .map_err(|error| Failure::Usage(format!("options on standard input: {error}")))?;
    let runtime = options::decode(Some(&asked)).map_err(|status| Failure::Usage(status.message))?;
    Ok((asked, runtime))
}

/// The output of `runc features`; none from a runtime without that command.
fn features(binary: &str) -> Option<Any> {
    let mut command = Command::new(binary);
    command.arg("features");
    let output = runtime::output(command, binary, LIMIT)
        .ok()
        .filter(|output| output.status.success())?;
    Some(Any {
        type_url: FEATURES.into(),
        value: output.stdout,
        ..Any::default()
    })
}

/// The text of `-v`, in the form of Go's shims.
pub(super) fn version() -> String {
    let version = env!("CARGO_PKG_VERSION");
    format!("containerd-shim-embed-v1:\n  Version:  {version}\n  Runtime:  {NAME}\n")
}

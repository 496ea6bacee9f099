//! `start`: answers where the daemon is, to every version of containerd in the same way. Leaves two
//! small files in the bundle and nothing in the daemon (invariant 12): containerd may give up right
//! afterwards, and calls nothing then.

use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::bootstrap_api::BootstrapParams;
use embedshim_core::ChildContext;
use embedshim_core::id::{ContainerId, Namespace};
use protobuf::Message;

use super::daemon::Place;
use super::failure::Failure;
use super::flags::Flags;
use crate::bundle::{BundleNote, write_atomically};

/// How long to wait for a daemon that starts: much shorter than kubelet's two minutes, much longer
/// than a loaded machine needs.
const LIMIT: Duration = Duration::from_secs(10);

/// Returns the text for standard output.
pub(super) fn run(flags: &Flags, stdin: &[u8]) -> Result<String, Failure> {
    flags.namespace.parse::<Namespace>()?;
    flags.id.parse::<ContainerId>()?;
    let place = Place::from_environment()?;
    place.ensure_served(LIMIT)?;
    // A plain address: the only form that containerd 1.6 and everything after it understand.
    let address = format!("unix://{}", place.socket.display());
    let bundle = Path::new(".");
    let failed = |source| Failure::Path {
        doing: "cannot write into the bundle",
        path: std::env::current_dir().unwrap_or_default(),
        source,
    };
    BundleNote {
        namespace: flags.namespace.clone(),
        events: events_address(flags, stdin),
        context: ChildContext::of_launcher(),
        ..BundleNote::default()
    }
    .write(bundle)
    .map_err(failed)?;
    // containerd 1.6 and 1.7 find the daemon by this file after their restart.
    write_atomically(bundle, "address", address.as_bytes()).map_err(failed)?;
    Ok(address)
}

/// The path of containerd's ttrpc socket: from its message, from the environment, or by its own
/// rule beside the gRPC socket.
fn events_address(flags: &Flags, stdin: &[u8]) -> String {
    parameters(flags, stdin)
        .map(|parameters| parameters.containerd_ttrpc_address)
        .or_else(|| std::env::var("TTRPC_ADDRESS").ok())
        .filter(|address| !address.is_empty())
        .unwrap_or_else(|| format!("{}.ttrpc", flags.address))
}

/// The message of containerd 2.3 and later. An older containerd sends its options, which can be
/// decoded as this message too, but then the names in it are not those of the command line.
pub(super) fn parameters(flags: &Flags, stdin: &[u8]) -> Option<BootstrapParams> {
    let parameters = BootstrapParams::parse_from_bytes(stdin).ok()?;
    let is_ours = parameters.instance_id == flags.id && parameters.namespace == flags.namespace;
    is_ours.then_some(parameters)
}

#[cfg(test)]
mod tests {
    use protobuf::well_known_types::any::Any;

    use super::super::flags::Action;
    use super::*;

    fn flags() -> Flags {
        Flags {
            action: Action::Start,
            namespace: "n".into(),
            id: "c".into(),
            address: "/run/c.sock".into(),
            bundle: None,
        }
    }

    #[test]
    fn the_message_of_containerd_2_3_is_told_from_old_options() {
        let new = BootstrapParams {
            instance_id: "c".into(),
            namespace: "n".into(),
            containerd_ttrpc_address: "/run/new.ttrpc".into(),
            ..BootstrapParams::default()
        };
        let old = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: b"n".to_vec(),
            ..Any::default()
        };
        let address = |bytes: Vec<u8>| {
            parameters(&flags(), &bytes).map(|found| found.containerd_ttrpc_address)
        };
        assert_eq!(
            address(new.write_to_bytes().unwrap()).as_deref(),
            Some("/run/new.ttrpc")
        );
        assert_eq!(address(old.write_to_bytes().unwrap()), None);
        assert_eq!(address(b"\xff\xff".to_vec()), None);
        assert_eq!(address(Vec::new()), None);
    }
}

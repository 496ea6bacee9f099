//! The daemon's listening sockets: taken over from a predecessor or made, and stored for a
//! successor.

use std::os::fd::AsFd;
use std::path::Path;

use anyhow::Context;
use embedshim_core::fdstore::{FdName, FdStore, InheritedFds, Listener};
use tracing::warn;

/// The listener of a predecessor or of systemd if it is the one of `path`, otherwise a new one.
/// Either way it is stored for a successor.
pub(super) fn open(
    name: &FdName,
    path: &Path,
    inherited: &mut InheritedFds,
    store: &dyn FdStore,
) -> anyhow::Result<Listener> {
    if let Some(descriptor) = inherited.take(name) {
        match shim_api::socket::resume(descriptor, path) {
            Ok(listener) => return Ok(listener),
            Err(error) => {
                warn!(
                    %error,
                    socket = %path.display(),
                    "cannot use the inherited listener: listening on a new one"
                );
                let _ = store.remove(name);
            }
        }
    }
    let listener = shim_api::socket::listen(path)
        .with_context(|| format!("cannot listen on {}", path.display()))?;
    if let Err(error) = store.add(name, &[listener.as_fd()]) {
        warn!(
            %error,
            "cannot store the listener: connections are refused while the daemon is replaced"
        );
    }
    Ok(listener)
}

/// A new listener in the place of one whose path was removed; it takes that one's place in the
/// store as well.
pub(super) fn recreate(
    name: &FdName,
    path: &Path,
    store: &dyn FdStore,
) -> anyhow::Result<Listener> {
    let listener = shim_api::socket::listen(path)?;
    let stored = store
        .remove(name)
        .and_then(|()| store.add(name, &[listener.as_fd()]));
    if let Err(error) = stored {
        warn!(
            %error,
            "cannot store the listener: connections are refused while the daemon is replaced"
        );
    }
    Ok(listener)
}

//! [`Pods`]: containers of pods whose sandbox controller this daemon is. containerd executes no
//! launcher for them. Owns what the launcher would have left in the bundle, and which program
//! containerd executes for a bundle that it gives up after its own restart.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use embedshim_core::id::{Namespace, SandboxId, SandboxKey};
use embedshim_core::sandbox::Sandboxes;
use embedshim_core::{ErrorKind, chain};
use nix::fcntl::OFlag;

use super::context::{Answer, invalid_id};
use crate::bundle::{BundleNote, write_atomically};
use crate::status;

/// The file in which containerd names the sandbox of a bundle's container.
const SANDBOX: &str = "sandbox";
/// The file in which containerd looks for the program that cleans up after a bundle. Without it
/// that is the one of the container's runtime, which is runc-v2's.
const SHIM_BINARY: &str = "shim-binary-path";
/// An id has 76 bytes at most.
const MAX_ID: u64 = 128;

/// The pods whose sandbox controller this daemon is.
#[derive(Clone, Debug)]
pub struct Pods {
    /// What containers join.
    pub sandboxes: Sandboxes,
    /// containerd's ttrpc socket, to which events are forwarded; no launcher tells it.
    pub events: String,
    /// The launcher's path, which containerd finds in each bundle.
    pub launcher: PathBuf,
}

impl Pods {
    /// Lets the container of this bundle join its sandbox, and leaves in the bundle what the
    /// launcher would have; `None` if the container is in no sandbox of embedshim. Repeatable.
    pub(super) async fn admit(
        &self,
        namespace: &Namespace,
        bundle: &Path,
        note: Option<&BundleNote>,
    ) -> Answer<Option<(SandboxId, BundleNote)>> {
        // A launcher was executed for it: its pod has a sandbox of the CRI's own controller.
        if note.is_some_and(|note| note.sandbox.is_empty()) {
            return Ok(None);
        }
        let path = bundle.to_owned();
        let named = blocking(move || read_id(&path)).await;
        let named = named.map_err(|error| {
            let at = bundle.display();
            status::invalid(format!(
                "cannot read which sandbox the container in {at} is in: {error}"
            ))
        })?;
        let Some(named) = named else {
            return Ok(None);
        };
        let id: SandboxId = named.parse().map_err(invalid_id)?;
        let key = SandboxKey {
            namespace: namespace.clone(),
            id: id.clone(),
        };
        let admitted = self.sandboxes.admit(&key, bundle).await;
        admitted.map_err(|error| {
            // "Not found" would be about the container.
            let kind = match error.kind() {
                ErrorKind::NotFound => ErrorKind::FailedPrecondition,
                kind => kind,
            };
            status::of_kind(kind, &chain(&error))
        })?;
        let note = BundleNote {
            namespace: namespace.to_string(),
            events: self.events.clone(),
            sandbox: named,
            ..note.cloned().unwrap_or_default()
        };
        let (path, launcher, written) = (bundle.to_owned(), self.launcher.clone(), note.clone());
        let write = move || {
            let program = launcher.as_os_str().as_encoded_bytes();
            write_atomically(&path, SHIM_BINARY, program)?;
            written.write(&path)
        };
        blocking(write).await.map_err(|error| {
            let at = bundle.display();
            status::internal(format!("cannot write into the bundle {at}: {error}"))
        })?;
        Ok(Some((id, note)))
    }
}

fn read_id(bundle: &Path) -> io::Result<Option<String>> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(bundle.join(SANDBOX));
    let mut text = String::new();
    match file {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?.take(MAX_ID).read_to_string(&mut text)?,
    };
    Ok(Some(text.trim_end().to_owned()).filter(|id| !id.is_empty()))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|failure| Err(io::Error::other(failure)))
}

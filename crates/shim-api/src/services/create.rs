//! `Create`: from containerd's request, the launcher's note in the bundle and the runtime's options
//! to the core's. Owns which namespace and which bundle a connection is bound to.

use std::io;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api;
use embedshim_core::id::Namespace;
use embedshim_core::rootfs::Mount;
use embedshim_core::stdio::StdioPaths;
use embedshim_core::task::{BundleId, CreateTask, Node, RuntimeOptions};
use protobuf::well_known_types::any::Any;
use tracing::warn;
use ttrpc::Code;

use super::context::{Answer, CallContext, required};
use super::options;
use super::pods::Pods;
use crate::bundle::BundleNote;
use crate::server::{Call, Creation};
use crate::status;

/// Creates the task that a request asks for; `node` acts on behalf of the call. A container of one
/// of the `pods` joins it.
pub(super) async fn create(
    call: &Call,
    node: &Node,
    pods: Option<&Pods>,
    request: api::CreateTaskRequest,
) -> Answer<api::CreateTaskResponse> {
    if let Some(why) = call.session.not_stored.get() {
        let id = &request.id;
        let text = format!(
            "container {id} would be lost with this daemon, since its connection is: {why}"
        );
        return Err(ttrpc::get_status(Code::RESOURCE_EXHAUSTED, text));
    }
    // Whose task it is: the namespace is in the note if it is not in the call.
    let bundle = PathBuf::from(&request.bundle);
    let (mut launcher_note, unnamed) = read_note(call, &bundle).await;
    let context = CallContext::new(call, node).map_err(|error| match unnamed {
        Some(why) if error.code() == Code::FAILED_PRECONDITION => required(&why),
        _ => error,
    })?;
    let key = context.key(&request.id)?;
    let mut sandbox = None;
    if let Some(pods) = pods
        && let Some((joined, note)) = pods
            .admit(&key.namespace, &bundle, launcher_note.as_ref())
            .await?
    {
        sandbox = Some(joined);
        launcher_note = Some(note);
    }
    if let Some(bundle) = bundle_id(&bundle).await {
        let id = key.id.clone();
        *call.session.creation() = Some(Creation { id, bundle });
    }
    // How it is to run.
    let mut runtime = decode_options(request.options.as_ref()).await?;
    if let Some(note) = &launcher_note {
        runtime.context.clone_from(&note.context);
    }
    let owner = launcher_note
        .as_ref()
        .map_or_else(String::new, |note| note.events.clone());
    if let Some(note) = launcher_note {
        complete_note(note, &bundle, &runtime, &key.namespace).await;
    }
    let request = CreateTask {
        key,
        bundle,
        rootfs: request.rootfs.into_iter().map(mount).collect(),
        stdio: StdioPaths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        },
        runtime,
        checkpoint: (!request.checkpoint.is_empty()).then(|| request.checkpoint.into()),
        owner,
        sandbox,
    };
    let pid = node.create(request).await.map_err(status::from)?;
    Ok(api::CreateTaskResponse {
        pid,
        ..api::CreateTaskResponse::default()
    })
}

/// A mount of a request.
pub(crate) fn mount(mount: api::Mount) -> Mount {
    Mount {
        kind: mount.type_,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    }
}

/// Which directory the bundle is, if it is there: without one nothing is created.
async fn bundle_id(bundle: &Path) -> Option<BundleId> {
    let path = bundle.to_owned();
    blocking(move || BundleId::of(&path)).await.ok()
}

/// The launcher's note in a bundle, whose namespace becomes the connection's; and if that stays
/// unknown, why.
async fn read_note(call: &Call, bundle: &Path) -> (Option<BundleNote>, Option<String>) {
    let (path, at) = (bundle.to_owned(), bundle.display());
    match blocking(move || BundleNote::read(&path)).await {
        Ok(Some(note)) => match note.namespace.parse::<Namespace>() {
            Ok(namespace) => {
                call.session.namespace.get_or_init(|| namespace);
                (Some(note), None)
            }
            Err(error) => (
                Some(note),
                Some(format!("the launcher's note in {at}: {error}")),
            ),
        },
        Ok(None) => (None, Some(format!("the launcher has left no note in {at}"))),
        Err(error) => {
            warn!(bundle = %at, %error, "launcher's note: cannot read it: no events are sent for this task");
            let text = format!("the launcher's note in {at} cannot be read: {error}");
            (None, Some(text))
        }
    }
}

/// Adds to the note what the launcher's `delete` needs if no daemon answers it.
async fn complete_note(
    mut note: BundleNote,
    bundle: &Path,
    runtime: &RuntimeOptions,
    namespace: &Namespace,
) {
    note.runtime.clone_from(&runtime.binary);
    note.runtime_root = runtime.root_of(namespace).to_string_lossy().into_owned();
    let path = bundle.to_owned();
    if let Err(error) = blocking(move || note.write(&path)).await {
        warn!(bundle = %bundle.display(), %error, "launcher's note: cannot complete it: the launcher's delete does not know the OCI runtime");
    }
}

async fn decode_options(asked: Option<&Any>) -> Answer<RuntimeOptions> {
    if !options::may_name_a_file(asked) {
        return options::decode(asked);
    }
    let asked = asked.cloned();
    tokio::task::spawn_blocking(move || options::decode(asked.as_ref()))
        .await
        .map_err(|error| status::internal(error.to_string()))?
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|failure| Err(io::Error::other(failure)))
}

//! `delete`: containerd has given a bundle up, after every normal deletion and after a lost
//! connection. The daemon knows which; without a daemon the runtime and the kernel are asked. Owns
//! that it is done within containerd's 5 seconds, and that it can be done twice.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use containerd_shim_protos::api::DeleteResponse;
use embedshim_core::id::{ContainerId, Namespace, TaskKey};
use embedshim_core::rootfs::unmount_recursive;
use embedshim_core::task::{RuntimeOptions, discard_record};
use protobuf::Message;

use super::client;
use super::daemon::Place;
use super::failure::Failure;
use super::flags::Flags;
use super::runtime::output;
use crate::bundle::BundleNote;
use crate::services::launcher::{CLEANUP, CleanupRequest, CleanupResponse, NAME};
use crate::services::timestamp;

/// How long to wait for a daemon that starts, since it knows the exit status. Half of containerd's
/// time must remain to do without.
const START_LIMIT: Duration = Duration::from_millis(2500);
/// How long to wait for the daemon's answer. It goes on with the work afterwards.
const ASK_LIMIT: Duration = Duration::from_millis(4500);
/// How long the OCI runtime's `delete` can take, and its `state`.
const RUNTIME_LIMIT: Duration = Duration::from_secs(2);
const STATE_LIMIT: Duration = Duration::from_millis(500);
/// How long to wait for the answer of a daemon that started late.
const LATE_ASK_LIMIT: Duration = Duration::from_millis(200);
/// The exit status that runc-v2 reports of a container whose shim died.
const KILLED: u32 = 137;

/// Returns the message for standard output.
pub(super) fn run(flags: &Flags) -> Result<Vec<u8>, Failure> {
    let began = Instant::now();
    let namespace: Namespace = flags.namespace.parse()?;
    let id: ContainerId = flags.id.parse()?;
    let bundle = bundle(flags)?;
    let place = Place::from_environment()?;
    let answer = match place.ensure_served(START_LIMIT) {
        Ok(stream) => ask(
            stream,
            &namespace,
            &id,
            &bundle,
            ASK_LIMIT.saturating_sub(began.elapsed()),
        )?,
        Err(_) => None,
    };
    let response = match answer {
        Some(CleanupResponse::Removed(removed)) => {
            response(removed.pid, removed.exit_status, removed.exited_at())
        }
        Some(CleanupResponse::Replaced) => response(0, KILLED, SystemTime::now()),
        // Mostly the call after a normal deletion, which finds nothing to do. But a daemon that
        // lost its records does not know of a container that runs.
        Some(CleanupResponse::Unknown) => without_daemon(&namespace, &id, &bundle)?,
        None => {
            let response = without_daemon(&namespace, &id, &bundle)?;
            let limit = ASK_LIMIT
                .saturating_sub(began.elapsed())
                .max(LATE_ASK_LIMIT);
            // A daemon may have started meanwhile, and loaded the container's record before the
            // container was removed.
            let asked = match place.connect() {
                Some(stream) => ask(stream, &namespace, &id, &bundle, limit),
                None => Ok(None),
            };
            if !matches!(asked, Ok(Some(_))) {
                discard_record(&place.state_dir, &TaskKey { namespace, id })?;
            }
            response
        }
    };
    response
        .write_to_bytes()
        .map_err(|error| Failure::Streams(error.into()))
}

fn bundle(flags: &Flags) -> Result<PathBuf, Failure> {
    let bundle = match &flags.bundle {
        Some(bundle) => bundle.clone(),
        // As Go's shims do: containerd executes them in the bundle.
        None => std::env::current_dir()?,
    };
    if bundle.is_absolute() {
        Ok(bundle)
    } else {
        Err(Failure::Usage(format!(
            "the bundle {} is not an absolute path",
            bundle.display()
        )))
    }
}

/// Asks the daemon; `None` if none answers.
fn ask(
    stream: UnixStream,
    namespace: &Namespace,
    id: &ContainerId,
    bundle: &Path,
    limit: Duration,
) -> Result<Option<CleanupResponse>, Failure> {
    let request = CleanupRequest {
        namespace: namespace.to_string(),
        id: id.to_string(),
        bundle: bundle.into(),
    };
    let request = serde_json::to_vec(&request).map_err(|error| Failure::Streams(error.into()))?;
    match client::call(stream, NAME, CLEANUP, request, limit) {
        Ok(Ok(answer)) => serde_json::from_slice(&answer)
            .map(Some)
            .map_err(|error| Failure::Refused(error.to_string())),
        Ok(Err(refusal)) => Err(Failure::Refused(refusal)),
        // The daemon goes on with it; containerd tries again at its next start.
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock
            ) =>
        {
            Err(Failure::Refused(
                "it is still busy removing the container".into(),
            ))
        }
        Err(_) => Ok(None),
    }
}

/// Does what Go's shims do: `runc delete --force`, unmount, 137. Any file of the bundle may be
/// missing.
fn without_daemon(
    namespace: &Namespace,
    id: &ContainerId,
    bundle: &Path,
) -> Result<DeleteResponse, Failure> {
    let note = BundleNote::read(bundle).ok().flatten().unwrap_or_default();
    let defaults = RuntimeOptions {
        binary: note.runtime,
        ..RuntimeOptions::default()
    };
    let root = match note.runtime_root.as_str() {
        "" => defaults.root_of(namespace),
        root => root.into(),
    };
    let pid = std::fs::read_to_string(bundle.join("init.pid"))
        .ok()
        .and_then(|text| text.trim().parse().ok());
    let binary = defaults.binary_or_default();
    // A container of another containerd may have the same id.
    if root.join(id.as_str()).exists() && !is_of_another_bundle(binary, &root, id, bundle) {
        let mut command = Command::new(binary);
        command
            .arg("--root")
            .arg(&root)
            .args(["delete", "--force", id.as_str()]);
        let output = output(command, binary, RUNTIME_LIMIT)?;
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(Failure::Runtime {
                binary: binary.into(),
                why,
            });
        }
    }
    unmount_recursive(&bundle.join("rootfs"))?;
    Ok(response(pid.unwrap_or(0), KILLED, SystemTime::now()))
}

/// Whether the runtime's container of this id was created from another bundle, as far as it can be
/// found out.
fn is_of_another_bundle(binary: &str, root: &Path, id: &ContainerId, bundle: &Path) -> bool {
    #[derive(serde::Deserialize)]
    struct State {
        bundle: PathBuf,
    }
    let mut command = Command::new(binary);
    command.arg("--root").arg(root).args(["state", id.as_str()]);
    let answer = output(command, binary, STATE_LIMIT);
    let state = answer
        .ok()
        .and_then(|output| serde_json::from_slice::<State>(&output.stdout).ok());
    state.is_some_and(|state| {
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        real(&state.bundle) != real(bundle)
    })
}

fn response(pid: u32, exit_status: u32, exited_at: SystemTime) -> DeleteResponse {
    DeleteResponse {
        pid,
        exit_status,
        exited_at: timestamp::of(exited_at),
        ..DeleteResponse::default()
    }
}

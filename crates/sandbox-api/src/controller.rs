//! [`Controller`]: what each call of containerd's sandbox controller means. Owns the answers that
//! only containerd needs: where the Task service is, which platform this is.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use embedshim_core::chain;
use embedshim_core::id::{Namespace, SandboxKey};
use embedshim_core::sandbox::{SandboxError, SandboxSnapshot, Sandboxes};
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use serde_json::json;
use tracing::warn;

use crate::grpc::{Call, Code, Handler, Status};
use crate::known::known_to_containerd;
use crate::messages::controller as api;
use crate::request;

const SERVICE: &str = "/containerd.services.sandbox.v1.Controller/";
/// An OCI specification as JSON, as containerd's `typeurl` names it.
const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// The version of the Task service's API at the address that is answered.
pub const VERSION: u32 = 3;

/// Answers the calls of the sandbox controller.
#[derive(Clone, Debug)]
pub struct Controller {
    sandboxes: Sandboxes,
    /// Where the Task service of all containers is.
    address: String,
    /// Whose store has the sandboxes that are not given up.
    containerd: Option<PathBuf>,
}

type Answer<T> = Result<T, Status>;

impl Controller {
    /// For these sandboxes; the Task service listens on `socket`.
    pub fn new(sandboxes: Sandboxes, socket: &Path) -> Self {
        Self {
            sandboxes,
            address: format!("ttrpc+unix://{}", socket.display()),
            containerd: None,
        }
    }

    /// The same, for the containerd at this socket: a sandbox that it has given up without a word
    /// makes way for one of the same name.
    #[must_use]
    pub fn of_containerd(mut self, socket: &Path) -> Self {
        self.containerd = Some(socket.to_owned());
        self
    }

    async fn create(&self, call: &Call) -> Answer<api::CreateResponse> {
        let request: api::CreateRequest = parse(call)?;
        let sandbox_id = request.sandbox_id.clone();
        let request = request::decode(key(call, &sandbox_id)?, request)?;
        let mut created = self.sandboxes.create(request.clone());
        if let Err(SandboxError::NameTaken { other, .. }) = &created
            && self.removes_if_given_up(other).await
        {
            created = self.sandboxes.create(request);
        }
        created.map_err(status)?;
        Ok(api::CreateResponse {
            sandbox_id,
            ..api::CreateResponse::default()
        })
    }

    /// Removes a sandbox that containerd does not know any more: before 2.3 it forgets one whose
    /// pod a plugin of NRI has refused, and tells nothing. Each is in its store before it is known
    /// here.
    async fn removes_if_given_up(&self, key: &SandboxKey) -> bool {
        let Some(containerd) = &self.containerd else {
            return false;
        };
        let is_unattended = || self.sandboxes.unattended().contains(key);
        if !is_unattended() {
            return false;
        }
        match known_to_containerd(containerd, &key.namespace).await {
            // Again: containerd may wait for its end by now.
            Ok(known) if known.contains(key.id.as_str()) || !is_unattended() => return false,
            Ok(_) => {}
            Err(error) => {
                let containerd = containerd.display();
                warn!(%error, %containerd, "cannot ask containerd which sandboxes it knows");
                return false;
            }
        }
        warn!(sandbox = %key, "containerd has given a sandbox up: removing it for one of its name");
        let removed = self.sandboxes.remove(key).await;
        if let Err(error) = &removed {
            warn!(sandbox = %key, %error, "cannot remove a sandbox");
        }
        removed.is_ok()
    }

    async fn start(&self, call: &Call) -> Answer<api::StartResponse> {
        let (key, sandbox_id) = named(call)?;
        let started = self.sandboxes.start(&key).await.map_err(status)?;
        let spec = self.sandboxes.spec(&key).map_err(status)?;
        Ok(api::StartResponse {
            sandbox_id,
            // No process: the CRI writes `/proc/0/ns/*` into its containers' specs then.
            pid: 0,
            created_at: timestamp(started.created_at),
            labels: started.labels.into_iter().collect(),
            address: self.address.clone(),
            version: VERSION,
            spec: MessageField::some(Any {
                type_url: SPEC.into(),
                value: spec.into_bytes(),
                ..Any::default()
            }),
            ..api::StartResponse::default()
        })
    }

    fn status(&self, call: &Call) -> Answer<api::StatusResponse> {
        let request: api::StatusRequest = parse(call)?;
        let key = key(call, &request.sandbox_id)?;
        let found = self.sandboxes.state(&key).map_err(status)?;
        let state = if found.is_ready {
            "SANDBOX_READY"
        } else {
            "SANDBOX_NOTREADY"
        };
        let info = request.verbose.then(|| ("info".to_owned(), info(&found)));
        Ok(api::StatusResponse {
            sandbox_id: request.sandbox_id,
            pid: 0,
            state: state.into(),
            info: info.into_iter().collect(),
            created_at: timestamp(found.created_at),
            exited_at: found
                .ended
                .map_or_else(MessageField::none, |ended| timestamp(ended.at)),
            address: self.address.clone(),
            version: VERSION,
            ..api::StatusResponse::default()
        })
    }

    async fn wait(&self, call: &Call) -> Answer<api::WaitResponse> {
        let (key, _) = named(call)?;
        let ended = self.sandboxes.wait(&key).await.map_err(status)?;
        Ok(api::WaitResponse {
            exit_status: ended.code,
            exited_at: timestamp(ended.at),
            ..api::WaitResponse::default()
        })
    }

    async fn stop(&self, call: &Call) -> Answer<api::Nothing> {
        let (key, _) = named(call)?;
        self.sandboxes.stop(&key).await.map_err(status)?;
        Ok(api::Nothing::default())
    }

    async fn shutdown(&self, call: &Call) -> Answer<api::Nothing> {
        let (key, _) = named(call)?;
        self.sandboxes.remove(&key).await.map_err(status)?;
        Ok(api::Nothing::default())
    }
}

#[async_trait]
impl Handler for Controller {
    async fn call(&self, call: Call) -> Result<Vec<u8>, Status> {
        match call.path.strip_prefix(SERVICE) {
            Some("Create") => encode(self.create(&call).await),
            Some("Start") => encode(self.start(&call).await),
            Some("Status") => encode(self.status(&call)),
            Some("Wait") => encode(self.wait(&call).await),
            Some("Stop") => encode(self.stop(&call).await),
            Some("Shutdown") => encode(self.shutdown(&call).await),
            Some("Platform") => encode(Ok(platform())),
            // Of what a pod may use, the containers' cgroups know everything.
            Some("Update") => encode(Ok(api::Nothing::default())),
            _ => Err(Status::new(
                Code::Unimplemented,
                format!("unknown method {}", call.path),
            )),
        }
    }
}

fn platform() -> api::PlatformResponse {
    // As Go spells it.
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "x86" => "386",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        "loongarch64" => "loong64",
        other => other,
    };
    api::PlatformResponse {
        platform: MessageField::some(api::Platform {
            os: "linux".into(),
            architecture: architecture.into(),
            ..api::Platform::default()
        }),
        ..api::PlatformResponse::default()
    }
}

/// What `crictl inspectp` shows, in the form of the CRI's own controller, which containerd reads.
fn info(found: &SandboxSnapshot) -> String {
    let status = if found.is_ready { "running" } else { "stopped" };
    json!({
        "pid": 0,
        "processStatus": status,
        "netNamespaceClosed": !found.is_ready,
        "image": "",
        "snapshotKey": "",
        "snapshotter": "",
        "runtimeHandler": "",
        "runtimeType": found.labels.get("oci_runtime_type"),
        "runtimeOptions": null,
        "config": null,
        "runtimeSpec": null,
        "cniResult": null,
        "sandboxMetadata": null,
    })
    .to_string()
}

/// The sandbox that a call with nothing but its id means.
fn named(call: &Call) -> Answer<(SandboxKey, String)> {
    let request: api::SandboxRequest = parse(call)?;
    Ok((key(call, &request.sandbox_id)?, request.sandbox_id))
}

/// The checked name (invariant 10).
fn key(call: &Call, id: &str) -> Answer<SandboxKey> {
    let invalid = |error| Status::new(Code::InvalidArgument, format!("{error}"));
    let namespace: Namespace = call.namespace.parse().map_err(invalid)?;
    let id = id.parse().map_err(invalid)?;
    Ok(SandboxKey { namespace, id })
}

fn parse<M: Message>(call: &Call) -> Answer<M> {
    M::parse_from_bytes(&call.message)
        .map_err(|error| Status::new(Code::InvalidArgument, format!("{}: {error}", call.path)))
}

fn encode<M: Message>(answer: Answer<M>) -> Answer<Vec<u8>> {
    let message = answer?;
    message
        .write_to_bytes()
        .map_err(|error| Status::new(Code::Internal, error.to_string()))
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "the signature that `map_err` takes"
)]
fn status(error: SandboxError) -> Status {
    Status::new(error.kind().into(), chain(&error))
}

/// A time since 1970, as all of a running node are.
fn timestamp(time: SystemTime) -> MessageField<Timestamp> {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    MessageField::some(Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Timestamp::default()
    })
}

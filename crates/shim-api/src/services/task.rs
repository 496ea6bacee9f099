//! The Task service: protobuf in, [`Node`]'s operations, protobuf out. Owns nothing but the translation.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::shim::oci::ProcessDetails;
use embedshim_core::id::Namespace;
use embedshim_core::rootfs::Mount;
use embedshim_core::stdio::StdioPaths;
use embedshim_core::task::{
    BundleId, CheckpointTask, CreateTask, Deleted, Errand, ExecProcess, Node, ProcessEntry,
    ProcessStatus, RuntimeOptions, Witness,
};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use tracing::warn;
use ttrpc::{Code, Status};

use super::scope::{Scope, invalid_id, required};
use super::{any, metrics, options, timestamp};
use crate::bundle::BundleNote;
use crate::server::{Call, Creation, Outcomes};
use crate::status;

type Answer<T> = Result<T, Status>;

#[derive(Debug)]
pub(crate) struct TaskService {
    node: Node,
}

impl TaskService {
    pub(crate) fn new(node: Node) -> Self {
        Self { node }
    }

    pub(crate) async fn call(&self, call: &Call) -> Answer<Vec<u8>> {
        let errand = Errand {
            request: call.request,
            is_again: call.is_again,
            witness: call.outcomes.clone().map(|outcomes| {
                let witness: Arc<dyn Witness> = Arc::new(Answering(outcomes));
                witness
            }),
        };
        Self::new(self.node.on_behalf_of(errand))
            .carry_out(call)
            .await
    }

    async fn carry_out(&self, call: &Call) -> Answer<Vec<u8>> {
        let scope = || Scope::of(call, &self.node);
        match call.method.as_str() {
            "State" => encode(&self.state(&scope()?, decode(call)?)?),
            "Create" => encode(&self.create(call, decode(call)?).await?),
            "Start" => encode(&self.start(&scope()?, decode(call)?).await?),
            "Delete" => encode(&self.delete(&scope()?, decode(call)?).await?),
            "Pids" => encode(&self.pids(&scope()?, decode(call)?).await?),
            "Pause" => self.pause(&scope()?, decode(call)?).await.map(empty),
            "Resume" => self.resume(&scope()?, decode(call)?).await.map(empty),
            "Checkpoint" => self.checkpoint(&scope()?, decode(call)?).await.map(empty),
            "Kill" => self.kill(&scope()?, decode(call)?).await.map(empty),
            "Exec" => self.exec(&scope()?, decode(call)?).await.map(empty),
            "ResizePty" => self.resize_pty(&scope()?, &decode(call)?).map(empty),
            "CloseIO" => self.close_io(&scope()?, decode(call)?).await.map(empty),
            "Update" => self.update(&scope()?, decode(call)?).await.map(empty),
            "Wait" => encode(&self.wait(&scope()?, decode(call)?).await?),
            "Stats" => encode(&self.stats(&scope()?, decode(call)?).await?),
            "Connect" => encode(&self.connect(&scope()?, &decode(call)?)?),
            // One daemon serves everybody: it never ends because one container did (`containerd.md` 2.5).
            "Shutdown" => decode::<api::ShutdownRequest>(call).map(|_| Vec::new()),
            _ => Err(status::unknown_method(&call.method)),
        }
    }

    fn state(&self, scope: &Scope<'_>, request: api::StateRequest) -> Answer<api::StateResponse> {
        let now = self
            .node
            .state(&scope.process(&request.id, &request.exec_id)?)
            .map_err(status::from)?;
        Ok(api::StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: now.bundle.to_string_lossy().into_owned(),
            pid: now.pid,
            status: status_of(now.status).into(),
            stdin: now.stdio.stdin,
            stdout: now.stdio.stdout,
            stderr: now.stdio.stderr,
            terminal: now.stdio.terminal,
            exit_status: now.exit.map_or(0, |exit| exit.code),
            exited_at: timestamp::of_or_go_zero(now.exit.map(|exit| exit.at)),
            ..api::StateResponse::default()
        })
    }

    async fn create(
        &self,
        call: &Call,
        request: api::CreateTaskRequest,
    ) -> Answer<api::CreateTaskResponse> {
        if let Some(why) = call.session.not_kept.get() {
            let id = &request.id;
            let text = format!(
                "container {id} would be lost with this daemon, since its connection is: {why}"
            );
            return Err(ttrpc::get_status(Code::RESOURCE_EXHAUSTED, text));
        }
        let bundle = PathBuf::from(&request.bundle);
        let (note, unnamed) = read_note(call, &bundle).await;
        let scope = Scope::of(call, &self.node).map_err(|error| match unnamed {
            Some(why) if error.code() == Code::FAILED_PRECONDITION => required(&why),
            _ => error,
        })?;
        let key = scope.key(&request.id)?;
        if let Some(bundle) = bundle_id(&bundle).await {
            let id = key.id.clone();
            *call.session.creation() = Some(Creation { id, bundle });
        }
        let mut runtime = decode_options(request.options.as_ref()).await?;
        if let Some(note) = &note {
            runtime.context.clone_from(&note.context);
        }
        let owner = note
            .as_ref()
            .map_or_else(String::new, |note| note.events.clone());
        if let Some(note) = note {
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
        };
        let pid = self.node.create(request).await.map_err(status::from)?;
        Ok(api::CreateTaskResponse {
            pid,
            ..api::CreateTaskResponse::default()
        })
    }

    async fn start(
        &self,
        scope: &Scope<'_>,
        request: api::StartRequest,
    ) -> Answer<api::StartResponse> {
        let pid = self
            .node
            .start(&scope.process(&request.id, &request.exec_id)?)
            .await
            .map_err(status::from)?;
        Ok(api::StartResponse {
            pid,
            ..api::StartResponse::default()
        })
    }

    async fn delete(
        &self,
        scope: &Scope<'_>,
        request: api::DeleteRequest,
    ) -> Answer<api::DeleteResponse> {
        let gone = self
            .node
            .delete(&scope.process(&request.id, &request.exec_id)?)
            .await
            .map_err(status::from)?;
        Ok(delete_response(gone))
    }

    async fn pids(
        &self,
        scope: &Scope<'_>,
        request: api::PidsRequest,
    ) -> Answer<api::PidsResponse> {
        let entries = self
            .node
            .pids(&scope.task(&request.id)?)
            .await
            .map_err(status::from)?;
        let processes = entries
            .into_iter()
            .map(process_info)
            .collect::<Answer<_>>()?;
        Ok(api::PidsResponse {
            processes,
            ..api::PidsResponse::default()
        })
    }

    async fn pause(&self, scope: &Scope<'_>, request: api::PauseRequest) -> Answer<()> {
        self.node
            .pause(&scope.task(&request.id)?)
            .await
            .map_err(status::from)
    }

    async fn resume(&self, scope: &Scope<'_>, request: api::ResumeRequest) -> Answer<()> {
        self.node
            .resume(&scope.task(&request.id)?)
            .await
            .map_err(status::from)
    }

    async fn checkpoint(
        &self,
        scope: &Scope<'_>,
        request: api::CheckpointTaskRequest,
    ) -> Answer<()> {
        let key = scope.task(&request.id)?;
        let options = options::decode_checkpoint(request.options.as_ref())?;
        let request = CheckpointTask {
            image: request.path.into(),
            work: (!options.work_path.is_empty()).then(|| options.work_path.into()),
            exit: options.exit,
            tcp: options.open_tcp,
            unix_sockets: options.external_unix_sockets,
            terminal: options.terminal,
            file_locks: options.file_locks,
            empty_namespaces: options.empty_namespaces,
            cgroups_mode: options.cgroups_mode,
        };
        self.node
            .checkpoint(&key, request)
            .await
            .map_err(status::from)
    }

    async fn kill(&self, scope: &Scope<'_>, request: api::KillRequest) -> Answer<()> {
        let key = scope.process(&request.id, &request.exec_id)?;
        self.node
            .kill(&key, request.signal, request.all)
            .await
            .map_err(status::from)
    }

    async fn exec(&self, scope: &Scope<'_>, request: api::ExecProcessRequest) -> Answer<()> {
        let request = ExecProcess {
            task: scope.task(&request.id)?,
            exec: request.exec_id.parse().map_err(invalid_id)?,
            spec: any::json(request.spec.as_ref(), "Process")?,
            stdio: StdioPaths {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
        };
        self.node.exec(request).await.map_err(status::from)
    }

    fn resize_pty(&self, scope: &Scope<'_>, request: &api::ResizePtyRequest) -> Answer<()> {
        let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
        let key = scope.process(&request.id, &request.exec_id)?;
        self.node
            .resize_pty(&key, cells(request.width), cells(request.height))
            .map_err(status::from)
    }

    async fn close_io(&self, scope: &Scope<'_>, request: api::CloseIORequest) -> Answer<()> {
        self.node
            .close_stdin(&scope.process(&request.id, &request.exec_id)?)
            .await
            .map_err(status::from)
    }

    async fn update(&self, scope: &Scope<'_>, request: api::UpdateTaskRequest) -> Answer<()> {
        let resources = any::json(request.resources.as_ref(), "LinuxResources")?;
        self.node
            .update(&scope.task(&request.id)?, resources)
            .await
            .map_err(status::from)
    }

    async fn wait(
        &self,
        scope: &Scope<'_>,
        request: api::WaitRequest,
    ) -> Answer<api::WaitResponse> {
        let exit = self
            .node
            .wait(&scope.process(&request.id, &request.exec_id)?)
            .await
            .map_err(status::from)?;
        Ok(api::WaitResponse {
            exit_status: exit.code,
            exited_at: timestamp::of(exit.at),
            ..api::WaitResponse::default()
        })
    }

    async fn stats(
        &self,
        scope: &Scope<'_>,
        request: api::StatsRequest,
    ) -> Answer<api::StatsResponse> {
        let now = self
            .node
            .stats(&scope.task(&request.id)?)
            .await
            .map_err(status::from)?;
        let stats = MessageField::some(metrics::encode(&now)?);
        Ok(api::StatsResponse {
            stats,
            ..api::StatsResponse::default()
        })
    }

    /// For a task there is not, runc-v2 answers pid 0 and no error.
    fn connect(
        &self,
        scope: &Scope<'_>,
        request: &api::ConnectRequest,
    ) -> Answer<api::ConnectResponse> {
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.node.init_pid(&scope.task(&request.id)?),
            version: env!("CARGO_PKG_VERSION").into(),
            ..api::ConnectResponse::default()
        })
    }
}

fn decode<T: Message>(call: &Call) -> Answer<T> {
    T::parse_from_bytes(&call.payload)
        .map_err(|error| status::invalid(format!("unmarshal request error: {error}")))
}

fn encode(message: &impl Message) -> Answer<Vec<u8>> {
    message
        .write_to_bytes()
        .map_err(|error| status::internal(error.to_string()))
}

/// `google.protobuf.Empty` has no bytes.
fn empty((): ()) -> Vec<u8> {
    Vec::new()
}

pub(crate) fn mount(mount: api::Mount) -> Mount {
    Mount {
        kind: mount.type_,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    }
}

fn delete_response(gone: Deleted) -> api::DeleteResponse {
    api::DeleteResponse {
        pid: gone.pid,
        exit_status: gone.exit.map_or(0, |exit| exit.code),
        exited_at: timestamp::of_or_go_zero(gone.exit.map(|exit| exit.at)),
        ..api::DeleteResponse::default()
    }
}

/// Notes the answer to a `Delete` before the evidence for it is gone.
#[derive(Debug)]
struct Answering(Outcomes);

#[async_trait]
impl Witness for Answering {
    async fn deleted(&self, deleted: Deleted) {
        match encode(&delete_response(deleted)) {
            Ok(answer) => self.0.note(answer).await,
            Err(status) => warn!(text = status.message, "an answer cannot be noted"),
        }
    }
}

fn status_of(status: ProcessStatus) -> api::Status {
    match status {
        ProcessStatus::Created => api::Status::CREATED,
        ProcessStatus::Running => api::Status::RUNNING,
        ProcessStatus::Stopped => api::Status::STOPPED,
        ProcessStatus::Paused => api::Status::PAUSED,
        ProcessStatus::Pausing => api::Status::PAUSING,
    }
}

fn process_info(entry: ProcessEntry) -> Answer<api::ProcessInfo> {
    let info = match entry.exec {
        None => MessageField::none(),
        Some(exec) => {
            let details = ProcessDetails {
                exec_id: exec.into(),
                ..ProcessDetails::default()
            };
            MessageField::some(any::pack("containerd.runc.v1.ProcessDetails", &details)?)
        }
    };
    Ok(api::ProcessInfo {
        pid: entry.pid,
        info,
        ..api::ProcessInfo::default()
    })
}

/// Which directory it is, if it is there: without one nothing is created.
async fn bundle_id(bundle: &Path) -> Option<BundleId> {
    let path = bundle.to_owned();
    blocking(move || BundleId::of(&path)).await.ok()
}

/// The launcher's note in a bundle, whose namespace is the connection's; and why that is not known.
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
            warn!(bundle = %at, %error, "the launcher's note is not readable: no events for this task");
            let text = format!("the launcher's note in {at} cannot be read: {error}");
            (None, Some(text))
        }
    }
}

/// Adds to the note what the launcher's `delete` needs if it has to do without us.
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
        warn!(bundle = %bundle.display(), %error, "the launcher's note is not writable");
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

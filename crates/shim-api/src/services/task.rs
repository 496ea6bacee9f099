//! The Task service: protobuf in, [`Node`]'s operations, protobuf out. Owns nothing but the
//! translation.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::shim::oci::ProcessDetails;
use embedshim_core::stdio::StdioPaths;
use embedshim_core::task::{
    CheckpointTask, DeleteObserver, Deleted, ExecProcess, Node, ProcessEntry, ProcessStatus,
    RequestContext,
};
use protobuf::{Message, MessageField};
use tracing::warn;

use super::context::{Answer, CallContext, invalid_id};
use super::create::create;
use super::pods::Pods;
use super::{any, metrics, options, timestamp};
use crate::server::{Call, Outcomes};
use crate::status;

/// The Task service of one node.
#[derive(Debug)]
pub(crate) struct TaskService {
    node: Node,
    pods: Option<Pods>,
}

impl TaskService {
    pub(crate) fn new(node: Node) -> Self {
        Self { node, pods: None }
    }

    /// The same, which creates containers in these pods as well.
    pub(crate) fn with_pods(self, pods: Pods) -> Self {
        let pods = Some(pods);
        Self { pods, ..self }
    }

    /// Begins a `Wait`, which has not to do with its request any more.
    pub(crate) fn wait(
        &self,
        call: &Call,
    ) -> Answer<impl Future<Output = Answer<Vec<u8>>> + Send + use<>> {
        let context = CallContext::new(call, &self.node)?;
        let request: api::WaitRequest = decode(call)?;
        let process = context.process(&request.id, &request.exec_id)?;
        let ended = self.node.wait(&process);
        Ok(async {
            let exit = ended.await.map_err(status::from)?;
            encode(&api::WaitResponse {
                exit_status: exit.code,
                exited_at: timestamp::of(exit.at),
                ..api::WaitResponse::default()
            })
        })
    }

    /// Answers any other call.
    pub(crate) async fn call(&self, call: &Call) -> Answer<Vec<u8>> {
        let node = &self.node.with_context(request_context(call));
        let context = || CallContext::new(call, node);
        match call.method.as_str() {
            "State" => encode(&state(&context()?, decode(call)?)?),
            "Create" => {
                let pods = self.pods.as_ref();
                encode(&create(call, node, pods, decode(call)?).await?)
            }
            "Start" => encode(&start(&context()?, decode(call)?).await?),
            "Delete" => encode(&delete(&context()?, decode(call)?).await?),
            "Pids" => encode(&pids(&context()?, decode(call)?).await?),
            "Pause" => pause(&context()?, decode(call)?).await.map(empty),
            "Resume" => resume(&context()?, decode(call)?).await.map(empty),
            "Checkpoint" => checkpoint(&context()?, decode(call)?).await.map(empty),
            "Kill" => kill(&context()?, decode(call)?).await.map(empty),
            "Exec" => exec(&context()?, decode(call)?).await.map(empty),
            "ResizePty" => resize_pty(&context()?, &decode(call)?).map(empty),
            "CloseIO" => close_io(&context()?, decode(call)?).await.map(empty),
            "Update" => update(&context()?, decode(call)?).await.map(empty),
            "Stats" => encode(&stats(&context()?, decode(call)?).await?),
            "Connect" => encode(&connect(&context()?, &decode(call)?)?),
            // One daemon serves all containers: it does not end because one of them did.
            "Shutdown" => decode::<api::ShutdownRequest>(call).map(|_| Vec::new()),
            _ => Err(status::unknown_method(&call.method)),
        }
    }
}

/// On whose behalf the node acts for this call: what it does for a request is done once, also when
/// the request is replayed (invariant 16).
fn request_context(call: &Call) -> RequestContext {
    RequestContext {
        request: call.request,
        is_replay: call.is_replay,
        observer: call.outcomes.clone().map(|outcomes| {
            let observer: Arc<dyn DeleteObserver> = Arc::new(DeletionNote(outcomes));
            observer
        }),
    }
}

fn state(context: &CallContext<'_>, request: api::StateRequest) -> Answer<api::StateResponse> {
    let now = context
        .node
        .state(&context.process(&request.id, &request.exec_id)?)
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

async fn start(
    context: &CallContext<'_>,
    request: api::StartRequest,
) -> Answer<api::StartResponse> {
    let pid = context
        .node
        .start(&context.process(&request.id, &request.exec_id)?)
        .await
        .map_err(status::from)?;
    Ok(api::StartResponse {
        pid,
        ..api::StartResponse::default()
    })
}

async fn delete(
    context: &CallContext<'_>,
    request: api::DeleteRequest,
) -> Answer<api::DeleteResponse> {
    let gone = context
        .node
        .delete(&context.process(&request.id, &request.exec_id)?)
        .await
        .map_err(status::from)?;
    Ok(delete_response(gone))
}

async fn pids(context: &CallContext<'_>, request: api::PidsRequest) -> Answer<api::PidsResponse> {
    let entries = context
        .node
        .pids(&context.task(&request.id)?)
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

async fn pause(context: &CallContext<'_>, request: api::PauseRequest) -> Answer<()> {
    context
        .node
        .pause(&context.task(&request.id)?)
        .await
        .map_err(status::from)
}

async fn resume(context: &CallContext<'_>, request: api::ResumeRequest) -> Answer<()> {
    context
        .node
        .resume(&context.task(&request.id)?)
        .await
        .map_err(status::from)
}

async fn checkpoint(context: &CallContext<'_>, request: api::CheckpointTaskRequest) -> Answer<()> {
    let key = context.task(&request.id)?;
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
    context
        .node
        .checkpoint(&key, request)
        .await
        .map_err(status::from)
}

async fn kill(context: &CallContext<'_>, request: api::KillRequest) -> Answer<()> {
    let key = context.process(&request.id, &request.exec_id)?;
    context
        .node
        .kill(&key, request.signal, request.all)
        .await
        .map_err(status::from)
}

async fn exec(context: &CallContext<'_>, request: api::ExecProcessRequest) -> Answer<()> {
    let request = ExecProcess {
        task: context.task(&request.id)?,
        exec: request.exec_id.parse().map_err(invalid_id)?,
        spec: any::json(request.spec.as_ref(), "Process")?,
        stdio: StdioPaths {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        },
    };
    context.node.exec(request).await.map_err(status::from)
}

fn resize_pty(context: &CallContext<'_>, request: &api::ResizePtyRequest) -> Answer<()> {
    let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
    let key = context.process(&request.id, &request.exec_id)?;
    context
        .node
        .resize_pty(&key, cells(request.width), cells(request.height))
        .map_err(status::from)
}

async fn close_io(context: &CallContext<'_>, request: api::CloseIORequest) -> Answer<()> {
    context
        .node
        .close_stdin(&context.process(&request.id, &request.exec_id)?)
        .await
        .map_err(status::from)
}

async fn update(context: &CallContext<'_>, request: api::UpdateTaskRequest) -> Answer<()> {
    let resources = any::json(request.resources.as_ref(), "LinuxResources")?;
    context
        .node
        .update(&context.task(&request.id)?, resources)
        .await
        .map_err(status::from)
}

async fn stats(
    context: &CallContext<'_>,
    request: api::StatsRequest,
) -> Answer<api::StatsResponse> {
    let now = context
        .node
        .stats(&context.task(&request.id)?)
        .await
        .map_err(status::from)?;
    let stats = MessageField::some(metrics::encode(&now)?);
    Ok(api::StatsResponse {
        stats,
        ..api::StatsResponse::default()
    })
}

/// Answers `Connect`. For a task that does not exist runc-v2 answers pid 0 and no error.
fn connect(
    context: &CallContext<'_>,
    request: &api::ConnectRequest,
) -> Answer<api::ConnectResponse> {
    Ok(api::ConnectResponse {
        shim_pid: std::process::id(),
        task_pid: context.node.init_pid(&context.task(&request.id)?),
        version: env!("CARGO_PKG_VERSION").into(),
        ..api::ConnectResponse::default()
    })
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

fn delete_response(gone: Deleted) -> api::DeleteResponse {
    api::DeleteResponse {
        pid: gone.pid,
        exit_status: gone.exit.map_or(0, |exit| exit.code),
        exited_at: timestamp::of_or_go_zero(gone.exit.map(|exit| exit.at)),
        ..api::DeleteResponse::default()
    }
}

/// Notes the answer to a `Delete` in the connection's journal, before what it is made from is gone.
#[derive(Debug)]
struct DeletionNote(Outcomes);

#[async_trait]
impl DeleteObserver for DeletionNote {
    async fn deleted(&self, deleted: Deleted) {
        match encode(&delete_response(deleted)) {
            Ok(answer) => self.0.note(answer).await,
            Err(status) => warn!(
                error = status.message,
                "delete: its answer is not durable: cannot encode it"
            ),
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

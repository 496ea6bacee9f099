//! [`Client`]: one container's connection to the daemon, as containerd has one. Each request is in
//! the ledger and must be answered; a connection that is lost, or an answer that does not come,
//! ends the life it belongs to as a failure.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Instant;

use anyhow::{Context, bail};
use containerd_shim_protos::shim::oci::CheckpointOptions;
use containerd_shim_protos::{TaskClient, api};
use embedshim_core::stdio::StdioPaths;
use embedshim_tests::Shim;
use nix::sys::signal::Signal;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use ttrpc::context::Context as Metadata;

use crate::bundle::Made;
use crate::ground::Ground;
use crate::ledger::{DEADLINE, Ledger};
use crate::plan::ProcessPlan;
use crate::streams::ClientStreams;

/// A message, or a refusal in words.
pub(crate) type Answer<T> = Result<T, String>;

/// In the environment of each exec and of what it starts: its name.
pub(crate) const EXEC: &str = "CHAOS_EXEC";

/// A request under way.
#[derive(Debug)]
pub(crate) struct Pending<T> {
    answer: Receiver<ttrpc::Result<T>>,
    what: String,
    ledger: Arc<Ledger>,
}

impl<T: std::fmt::Debug> Pending<T> {
    /// The answer, which is due now.
    pub(crate) fn answer(self) -> anyhow::Result<Answer<T>> {
        let since = Instant::now();
        let Ok(answer) = self.answer.recv_timeout(DEADLINE) else {
            bail!("request not answered: {}", self.what)
        };
        let shown = match &answer {
            Ok(_) => "ok".to_owned(),
            Err(error) => format!("{error}"),
        };
        self.ledger.answered(&self.what, &shown, since.elapsed());
        match answer {
            Ok(message) => Ok(Ok(message)),
            Err(ttrpc::Error::RpcStatus(status)) => Ok(Err(status.message)),
            Err(other) => bail!("connection lost: {}: {other}", self.what),
        }
    }
}

/// A connection for one container.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    shim: Arc<Shim>,
    ledger: Arc<Ledger>,
    id: String,
}

impl Client {
    pub(crate) fn connect(ground: &Ground, id: &str) -> anyhow::Result<Self> {
        Ok(Self {
            shim: Arc::new(Shim::at(&ground.state_dir, &ground.namespace)?),
            ledger: Arc::clone(&ground.ledger),
            id: id.into(),
        })
    }

    fn begin<Q, R>(
        &self,
        what: &str,
        request: Q,
        call: fn(&TaskClient, Metadata, &Q) -> ttrpc::Result<R>,
    ) -> Pending<R>
    where
        Q: Send + 'static,
        R: Send + 'static,
    {
        let (sender, answer) = sync_channel(1);
        let shim = Arc::clone(&self.shim);
        std::thread::spawn(move || {
            // What comes after the deadline is not waited for.
            let _ = sender.send(call(&shim.tasks, shim.metadata(), &request));
        });
        let what = format!("{} {what}", self.id);
        self.ledger.note(&format!("{what} ..."));
        Pending {
            answer,
            what,
            ledger: Arc::clone(&self.ledger),
        }
    }

    pub(crate) fn create(
        &self,
        bundle: &Made,
        streams: &ClientStreams<'_>,
    ) -> anyhow::Result<Answer<u32>> {
        self.create_from(bundle, streams, None)
    }

    /// Creates the container from a checkpoint, if there is one.
    pub(crate) fn create_from(
        &self,
        bundle: &Made,
        streams: &ClientStreams<'_>,
        checkpoint: Option<&Path>,
    ) -> anyhow::Result<Answer<u32>> {
        let StdioPaths {
            stdin,
            stdout,
            stderr,
            terminal,
        } = streams.paths();
        let request = api::CreateTaskRequest {
            id: self.id.clone(),
            bundle: bundle.path.display().to_string(),
            rootfs: bundle.mounts.clone(),
            stdin,
            stdout,
            stderr,
            terminal,
            checkpoint: checkpoint.map_or_else(String::new, |image| image.display().to_string()),
            ..api::CreateTaskRequest::default()
        };
        let answer = self.begin("Create", request, TaskClient::create).answer()?;
        Ok(answer.map(|response| response.pid))
    }

    pub(crate) fn start(&self, exec: &str) -> anyhow::Result<Answer<u32>> {
        let request = api::StartRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..api::StartRequest::default()
        };
        let what = format!("Start {exec}");
        let answer = self.begin(&what, request, TaskClient::start).answer()?;
        Ok(answer.map(|response| response.pid))
    }

    pub(crate) fn wait(&self, exec: &str) -> Pending<api::WaitResponse> {
        let request = api::WaitRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..api::WaitRequest::default()
        };
        self.begin(&format!("Wait {exec}"), request, TaskClient::wait)
    }

    pub(crate) fn state(&self, exec: &str) -> anyhow::Result<Answer<api::StateResponse>> {
        let request = api::StateRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..api::StateRequest::default()
        };
        self.begin(&format!("State {exec}"), request, TaskClient::state)
            .answer()
    }

    pub(crate) fn kill(&self, exec: &str, signal: Signal) -> anyhow::Result<Answer<api::Empty>> {
        let request = api::KillRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            signal: (signal as i32).unsigned_abs(),
            ..api::KillRequest::default()
        };
        let what = format!("Kill {exec} {signal}");
        self.begin(&what, request, TaskClient::kill).answer()
    }

    /// A signal to all processes of the container.
    pub(crate) fn kill_all(&self, signal: Signal) -> anyhow::Result<Answer<api::Empty>> {
        let request = api::KillRequest {
            id: self.id.clone(),
            signal: (signal as i32).unsigned_abs(),
            all: true,
            ..api::KillRequest::default()
        };
        let what = format!("Kill all {signal}");
        self.begin(&what, request, TaskClient::kill).answer()
    }

    /// Writes the container's state to files below `image`; with `exit` that is its end.
    pub(crate) fn checkpoint(
        &self,
        image: &Path,
        exit: bool,
    ) -> anyhow::Result<Answer<api::Empty>> {
        let options = CheckpointOptions {
            exit,
            ..CheckpointOptions::default()
        };
        let options = Any {
            type_url: "containerd.runc.v1.CheckpointOptions".into(),
            value: options.write_to_bytes().context("checkpoint options")?,
            ..Any::default()
        };
        let request = api::CheckpointTaskRequest {
            id: self.id.clone(),
            path: image.display().to_string(),
            options: MessageField::some(options),
            ..api::CheckpointTaskRequest::default()
        };
        let what = format!("Checkpoint exit={exit}");
        self.begin(&what, request, TaskClient::checkpoint).answer()
    }

    pub(crate) fn delete(&self, exec: &str) -> anyhow::Result<Answer<u32>> {
        let request = api::DeleteRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..api::DeleteRequest::default()
        };
        let what = format!("Delete {exec}");
        let answer = self.begin(&what, request, TaskClient::delete).answer()?;
        Ok(answer.map(|response| response.exit_status))
    }

    pub(crate) fn pids(&self) -> anyhow::Result<Answer<Vec<u32>>> {
        let request = api::PidsRequest {
            id: self.id.clone(),
            ..api::PidsRequest::default()
        };
        let answer = self.begin("Pids", request, TaskClient::pids).answer()?;
        Ok(answer.map(|response| response.processes.iter().map(|entry| entry.pid).collect()))
    }

    pub(crate) fn stats(&self) -> anyhow::Result<Answer<bool>> {
        let request = api::StatsRequest {
            id: self.id.clone(),
            ..api::StatsRequest::default()
        };
        let answer = self.begin("Stats", request, TaskClient::stats).answer()?;
        Ok(answer.map(|response| response.stats.is_some()))
    }

    pub(crate) fn connected_pid(&self) -> anyhow::Result<Answer<u32>> {
        let request = api::ConnectRequest {
            id: self.id.clone(),
            ..api::ConnectRequest::default()
        };
        let answer = self
            .begin("Connect", request, TaskClient::connect)
            .answer()?;
        Ok(answer.map(|response| response.task_pid))
    }

    pub(crate) fn pause(&self) -> anyhow::Result<Answer<api::Empty>> {
        let request = api::PauseRequest {
            id: self.id.clone(),
            ..api::PauseRequest::default()
        };
        self.begin("Pause", request, TaskClient::pause).answer()
    }

    pub(crate) fn resume(&self) -> anyhow::Result<Answer<api::Empty>> {
        let request = api::ResumeRequest {
            id: self.id.clone(),
            ..api::ResumeRequest::default()
        };
        self.begin("Resume", request, TaskClient::resume).answer()
    }

    pub(crate) fn close_stdin(&self, exec: &str) -> anyhow::Result<Answer<api::Empty>> {
        let request = api::CloseIORequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            stdin: true,
            ..api::CloseIORequest::default()
        };
        self.begin(&format!("CloseIO {exec}"), request, TaskClient::close_io)
            .answer()
    }

    pub(crate) fn shutdown(&self) -> anyhow::Result<Answer<api::Empty>> {
        let request = api::ShutdownRequest {
            id: self.id.clone(),
            ..api::ShutdownRequest::default()
        };
        self.begin("Shutdown", request, TaskClient::shutdown)
            .answer()
    }

    pub(crate) fn exec(
        &self,
        exec: &str,
        plan: &ProcessPlan,
        streams: &ClientStreams<'_>,
    ) -> anyhow::Result<Answer<api::Empty>> {
        let StdioPaths {
            stdin,
            stdout,
            stderr,
            terminal,
        } = streams.paths();
        let process = serde_json::json!({
            "args": plan.arguments(), "cwd": "/", "terminal": terminal,
            "env": ["PATH=/bin", format!("{EXEC}={exec}")],
        });
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: serde_json::to_vec(&process).context("an exec's process")?,
            ..Any::default()
        };
        let request = api::ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            spec: MessageField::some(spec),
            stdin,
            stdout,
            stderr,
            terminal,
            ..api::ExecProcessRequest::default()
        };
        self.begin(&format!("Exec {exec}"), request, TaskClient::exec)
            .answer()
    }
}

/// The message of an answer that must not be a refusal.
pub(crate) fn accepted<T>(what: &str, answer: anyhow::Result<Answer<T>>) -> anyhow::Result<T> {
    answer?.map_err(|words| anyhow::anyhow!("{what} is refused: {words}"))
}

/// An answer that must be this refusal.
pub(crate) fn refused<T>(
    what: &str,
    words: &str,
    answer: anyhow::Result<Answer<T>>,
) -> anyhow::Result<()> {
    match answer? {
        Err(told) if told.contains(words) => Ok(()),
        Err(told) => bail!("{what} is refused with {told:?} instead of {words:?}"),
        Ok(_) => bail!("{what} is not refused; due is {words:?}"),
    }
}

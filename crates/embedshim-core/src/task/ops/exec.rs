//! `Exec`, which declares a process; `Start` runs it. Owns which documents are accepted.

use std::sync::Arc;

use serde::Deserialize;

use crate::error::Error;
use crate::event::EventKind;
use crate::spec::nullable;
use crate::stdio::Plan;
use crate::task::api::ExecProcess;
use crate::task::context::RequestContext;
use crate::task::engine::Engine;
use crate::task::lifecycle::{Operation, Phase};
use crate::task::process::TaskProcess;

/// The OCI `Process` field that must agree with the request.
#[derive(Deserialize)]
struct ProcessTerminal {
    #[serde(default, deserialize_with = "nullable")]
    terminal: bool,
}

impl Engine {
    /// Declares an exec; nothing runs yet.
    pub(in crate::task) async fn exec(
        self: Arc<Self>,
        request: ExecProcess,
        context: RequestContext,
    ) -> Result<(), Error> {
        let task = self.registry.task(&request.task)?;
        if let Ok(known) = task.find(Some(&request.exec)) {
            if context.is_retry_of(known.made_by) {
                return Ok(());
            }
            return Err(Error::IdTaken {
                id: request.exec.to_string(),
            });
        }
        let init = task.init.now();
        if task.checkpoint.is_some() && init.phase() == Phase::Created {
            return Err(Error::WrongState("cannot exec in a created state"));
        }
        init.lifecycle.admit(Operation::Exec)?;
        Plan::parse(&request.stdio)?;
        let spec = process_document(&request.spec, request.stdio.terminal)?;
        task.add_exec(
            request.exec.clone(),
            TaskProcess::new(
                Some(request.exec.clone()),
                request.stdio,
                Some(spec),
                context.request,
                self.new_fds(),
            ),
        )?;
        let exec = request.exec.clone();
        self.emit(&task, EventKind::ExecAdded { exec });
        let saved = self.save(&task).await;
        if saved.is_err() {
            task.remove_exec(&request.exec);
        }
        saved.map(drop)
    }
}

/// The document as the runtime is to get it: its `terminal` is the request's, as runc-v2 sets it.
fn process_document(spec: &[u8], terminal: bool) -> Result<String, Error> {
    let invalid =
        |why: String| Error::Invalid(format!("the exec's process document is not valid: {why}"));
    let mut document: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(spec).map_err(|e| invalid(e.to_string()))?;
    let stated: ProcessTerminal =
        serde_json::from_slice(spec).map_err(|e| invalid(e.to_string()))?;
    if stated.terminal != terminal {
        document.insert("terminal".into(), terminal.into());
    }
    serde_json::to_string(&document).map_err(|e| invalid(e.to_string()))
}

//! How the history hears of events: of tasks beside the sink that sends them to containerd, of
//! sandboxes as their observer. Owns the words for events.

use std::sync::Arc;
use std::time::SystemTime;

use embedshim_core::event::{self, EventKind, EventSink};
use embedshim_core::id::SandboxKey;
use embedshim_core::sandbox::{SandboxChange, SandboxObserver};

use super::ring::{History, SANDBOX, since_epoch};
use crate::admin::documents::Event;

/// A sink whose events are remembered.
#[derive(Debug)]
pub(crate) struct Remembered {
    pub(crate) sink: Arc<dyn EventSink>,
    pub(crate) history: Arc<History>,
}

impl EventSink for Remembered {
    fn accept(&self, event: event::Event) {
        let remembered = of_task(&event);
        self.sink.accept(event);
        self.history.add(remembered);
    }
}

impl SandboxObserver for History {
    fn changed(&self, key: &SandboxKey, change: SandboxChange) {
        let (word, at, exit_code) = match change {
            SandboxChange::Started => ("started", SystemTime::now(), None),
            SandboxChange::Ended { code, at } => ("stopped", at, Some(code)),
            SandboxChange::Removed => ("removed", SystemTime::now(), None),
            _ => ("changed", SystemTime::now(), None),
        };
        self.add(Event {
            number: 0,
            at: since_epoch(at),
            kind: format!("{SANDBOX}{word}"),
            namespace: key.namespace.to_string(),
            id: key.id.to_string(),
            exec: None,
            pid: None,
            exit_code,
        });
    }
}

/// An event of a task, in the words of containerd's topics.
fn of_task(event: &event::Event) -> Event {
    let mut of = Event {
        number: 0,
        at: since_epoch(event.at),
        kind: String::new(),
        namespace: event.namespace.to_string(),
        id: event.id.to_string(),
        exec: None,
        pid: None,
        exit_code: None,
    };
    let word = match &event.kind {
        EventKind::Created { pid, .. } => {
            of.pid = Some(*pid);
            "create"
        }
        EventKind::Started { pid } => {
            of.pid = Some(*pid);
            "start"
        }
        EventKind::Exited {
            exec,
            pid,
            exit_code,
            exited_at,
        } => {
            of.exec = exec.as_ref().map(ToString::to_string);
            of.pid = Some(*pid);
            of.exit_code = Some(*exit_code);
            // It is told of again by each daemon that takes the task over.
            of.at = since_epoch(*exited_at);
            "exit"
        }
        EventKind::Deleted { pid, exit_code, .. } => {
            of.pid = Some(*pid);
            of.exit_code = Some(*exit_code);
            "delete"
        }
        EventKind::ExecAdded { exec } => {
            of.exec = Some(exec.to_string());
            "exec-added"
        }
        EventKind::ExecStarted { exec, pid } => {
            of.exec = Some(exec.to_string());
            of.pid = Some(*pid);
            "exec-started"
        }
        EventKind::Paused => "paused",
        EventKind::Resumed => "resumed",
        EventKind::Oom => "oom",
        _ => "other",
    };
    of.kind.push_str(word);
    of
}

//! [`Sandbox`]: one pod in memory: what was asked for, how far it is, who waits for its end. Owns
//! its record's content; writes no file.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::{Instant, SystemTime};

use tokio::sync::{Mutex, watch};

use crate::id::SandboxKey;
use crate::sandbox::api::{CreateSandbox, Ended, SandboxSnapshot};
use crate::sandbox::isolation::Isolation;
use crate::sandbox::place::Place;
use crate::sandbox::record::{Init, Phase, SandboxRecord, VERSION};
use crate::sandbox::spec::Shared;

/// How far a sandbox is, as its clients see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// It was created; nothing of it is on disk.
    Created(Instant),
    /// It has everything that containers need.
    Ready,
    /// A predecessor has begun its end, which has this code, or what it had is lost: it is being
    /// finished.
    Ending(u32),
    /// A predecessor has begun its start or its removal: what there is of it is being removed.
    Leaving,
    /// Its containers cannot be started any more.
    Ended(Ended),
    /// It was removed.
    Gone,
}

/// One pod.
#[derive(Debug)]
pub(super) struct Sandbox {
    pub(super) key: SandboxKey,
    pub(super) name: String,
    pub(super) isolation: Isolation,
    pub(super) place: Place,
    /// What its start needs; `None` after a daemon has taken it over.
    pub(super) request: Option<CreateSandbox>,
    /// Held while it is started, stopped or removed.
    pub(super) mutation: Mutex<()>,
    state: watch::Sender<State>,
    created_at: SystemTime,
    /// The init process of a pod whose containers share their processes.
    pub(super) init: OnceLock<Init>,
    labels: BTreeMap<String, String>,
    unknown: serde_json::Map<String, serde_json::Value>,
}

impl Sandbox {
    /// A sandbox that is to be started.
    pub(super) fn new(request: CreateSandbox, place: Place) -> Self {
        Self {
            key: request.key.clone(),
            name: request.name.clone(),
            isolation: Isolation::of(&request),
            place,
            init: OnceLock::new(),
            labels: request.labels.clone(),
            request: Some(request),
            mutation: Mutex::default(),
            state: watch::Sender::new(State::Created(Instant::now())),
            created_at: SystemTime::now(),
            unknown: serde_json::Map::new(),
        }
    }

    /// What a predecessor has left, in the state that was found out.
    pub(super) fn restored(record: SandboxRecord, place: Place, state: State) -> Self {
        Self {
            key: record.key,
            name: record.name,
            isolation: record.isolation,
            place,
            init: record.init.map(OnceLock::from).unwrap_or_default(),
            request: None,
            mutation: Mutex::default(),
            state: watch::Sender::new(state),
            created_at: record.created_at,
            labels: record.labels,
            unknown: record.unknown,
        }
    }

    pub(super) fn state(&self) -> State {
        *self.state.borrow()
    }

    pub(super) fn set(&self, state: State) {
        self.state.send_replace(state);
    }

    /// Whether a predecessor has begun something with it that is still to be finished.
    pub(super) fn is_unfinished(&self) -> bool {
        matches!(self.state(), State::Ending(_) | State::Leaving)
    }

    /// Waits for the end. A sandbox that is removed without one has ended then.
    pub(super) async fn ended(&self) -> Ended {
        let mut state = self.state.subscribe();
        let over = |state: &State| matches!(state, State::Ended(_) | State::Gone);
        match state.wait_for(over).await.as_deref() {
            Ok(State::Ended(ended)) => *ended,
            _ => Ended::now(0),
        }
    }

    /// Whether a client waits for its end: that client knows it.
    pub(super) fn is_awaited(&self) -> bool {
        self.state.receiver_count() > 0
    }

    pub(super) fn snapshot(&self) -> SandboxSnapshot {
        let state = self.state();
        SandboxSnapshot {
            created_at: self.created_at,
            is_ready: state == State::Ready,
            ended: match state {
                State::Ended(ended) => Some(ended),
                _ => None,
            },
            labels: self.labels.clone(),
            network: self.isolation.network.clone(),
        }
    }

    /// What its containers join.
    pub(super) fn shared(&self) -> Shared {
        Shared {
            isolation: self.isolation.clone(),
            pins: self.place.pins(),
        }
    }

    pub(super) fn record(&self, boot_id: &str, phase: Phase) -> SandboxRecord {
        SandboxRecord {
            version: VERSION,
            boot_id: boot_id.to_owned(),
            key: self.key.clone(),
            phase,
            created_at: self.created_at,
            ended: match self.state() {
                State::Ended(ended) => Some(ended),
                State::Ending(code) => Some(Ended::now(code)),
                _ => None,
            },
            name: self.name.clone(),
            isolation: self.isolation.clone(),
            init: self.init.get().cloned(),
            labels: self.labels.clone(),
            unknown: self.unknown.clone(),
        }
    }
}

//! The documents of sandboxes, as [`View`] answers them. Owns their words; the facts are
//! [`Sandboxes`](embedshim_core::sandbox::Sandboxes)'s and, of containers, the node's.

use std::time::SystemTime;

use embedshim_core::id::SandboxKey;
use embedshim_core::sandbox::{
    Ended, NamespaceOwner, SandboxNamespace, SandboxOverview, SandboxState, Sandboxes,
};
use embedshim_core::task::TaskOverview;

use super::documents::{
    Mount, Namespace, Sandbox, SandboxDetail, SandboxList, SandboxStates, VERSION, seconds,
};
use super::view::View;

impl View {
    /// The numbers in `/v1/status`; `None` if the daemon is no sandbox controller.
    pub(super) fn sandbox_states(&self) -> Option<SandboxStates> {
        let sandboxes = self.serving.get()?.sandboxes.as_ref()?;
        let mut states = SandboxStates::default();
        for sandbox in sandboxes.overview() {
            *match sandbox.state {
                SandboxState::Created => &mut states.created,
                SandboxState::Ready => &mut states.ready,
                SandboxState::Ending => &mut states.stopping,
                SandboxState::Ended(_) => &mut states.stopped,
            } += 1;
        }
        Some(states)
    }

    /// `/v1/sandboxes`.
    pub(super) fn sandboxes(&self) -> SandboxList {
        let serving = self.serving.get();
        let all = serving.and_then(|serving| serving.sandboxes.as_ref());
        let tasks = serving.map_or_else(Vec::new, |serving| serving.node.overview());
        let overview = all.map_or_else(Vec::new, Sandboxes::overview);
        SandboxList {
            version: VERSION,
            is_enabled: all.is_some(),
            sandboxes: overview.iter().map(|one| line(one, &tasks)).collect(),
        }
    }

    /// `/v1/sandboxes/NAMESPACE/ID`.
    pub(super) fn sandbox(&self, namespace: &str, id: &str) -> Option<SandboxDetail> {
        let key = SandboxKey {
            namespace: namespace.parse().ok()?,
            id: id.parse().ok()?,
        };
        let serving = self.serving.get()?;
        let sandbox = serving.sandboxes.as_ref()?.overview_of(&key)?;
        let tasks = serving.node.overview();
        Some(SandboxDetail {
            version: VERSION,
            sandbox: line(&sandbox, &tasks),
            record: sandbox
                .record
                .as_ref()
                .map(|path| path.display().to_string()),
            namespaces: sandbox.namespaces.iter().map(self::namespace).collect(),
            mounts: sandbox
                .mounts
                .iter()
                .map(|(target, source)| Mount {
                    target: target.display().to_string(),
                    source: source.display().to_string(),
                })
                .collect(),
            tasks: within(&sandbox, &tasks)
                .map(|task| task.key.id.to_string())
                .collect(),
            init_pid: sandbox.init_pid,
            ended_seconds_ago: ended(&sandbox).and_then(|ended| seconds_since(ended.at)),
        })
    }
}

fn line(sandbox: &SandboxOverview, tasks: &[TaskOverview]) -> Sandbox {
    let state = match sandbox.state {
        SandboxState::Created => "created",
        SandboxState::Ready => "ready",
        SandboxState::Ending => "stopping",
        SandboxState::Ended(_) => "stopped",
    };
    Sandbox {
        namespace: sandbox.key.namespace.to_string(),
        id: sandbox.key.id.to_string(),
        name: sandbox.name.clone(),
        state: state.to_owned(),
        age_seconds: seconds_since(sandbox.created_at),
        containers: within(sandbox, tasks).count(),
        exit_code: ended(sandbox).map(|ended| ended.code),
    }
}

/// The tasks that are in this sandbox.
fn within<'a>(
    sandbox: &'a SandboxOverview,
    tasks: &'a [TaskOverview],
) -> impl Iterator<Item = &'a TaskOverview> {
    let key = &sandbox.key;
    tasks.iter().filter(|task| {
        task.key.namespace == key.namespace && task.sandbox.as_ref() == Some(&key.id)
    })
}

fn ended(sandbox: &SandboxOverview) -> Option<Ended> {
    match sandbox.state {
        SandboxState::Ended(ended) => Some(ended),
        SandboxState::Created | SandboxState::Ready | SandboxState::Ending => None,
    }
}

fn namespace(namespace: &SandboxNamespace) -> Namespace {
    let (owner, pin) = match &namespace.owner {
        NamespaceOwner::Pod(pin) => ("pod", Some(pin.display().to_string())),
        NamespaceOwner::Container => ("container", None),
        NamespaceOwner::Node => ("node", None),
    };
    Namespace {
        name: namespace.name.to_owned(),
        owner: owner.to_owned(),
        pin,
        is_pinned: namespace.is_pinned(),
    }
}

/// `None` after the clock was set back.
fn seconds_since(time: SystemTime) -> Option<f64> {
    let since = SystemTime::now().duration_since(time).ok()?;
    Some(seconds(since))
}

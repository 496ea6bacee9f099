//! [`Isolation`]: which namespaces a pod has of its own and which are the node's. Owns what of them
//! is pinned, and under which name.

use nix::sched::CloneFlags;
use serde::{Deserialize, Serialize};

use crate::sandbox::api::{CreateSandbox, Network, Processes, Reach};

/// The namespaces of one pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Isolation {
    pub(super) network: Network,
    pub(super) ipc: Reach,
    pub(super) processes: Processes,
    /// A record of an earlier version has none.
    #[serde(default = "of_node")]
    pub(super) users: Reach,
}

fn of_node() -> Reach {
    Reach::Node
}

impl Isolation {
    /// What was asked for.
    pub(super) fn of(request: &CreateSandbox) -> Self {
        let users = match request.users {
            Some(_) => Reach::Pod,
            None => Reach::Node,
        };
        Self {
            network: request.network.clone(),
            ipc: request.ipc,
            processes: request.processes,
            users,
        }
    }

    pub(super) fn has_network(&self) -> bool {
        matches!(self.network, Network::Pod(_))
    }

    /// Names below `/proc/PID/ns` of the namespaces that are pinned. A network is the CRI's to pin.
    pub(super) fn pinned(&self) -> impl Iterator<Item = &'static str> + use<> {
        let all = [
            ("ipc", self.ipc == Reach::Pod),
            ("uts", self.has_network()),
            ("user", self.users == Reach::Pod),
            ("pid", self.processes == Processes::Pod),
        ];
        all.into_iter()
            .filter_map(|(name, is_own)| is_own.then_some(name))
    }

    /// Those of them that are made once the user namespace is joined.
    pub(super) fn made(&self) -> CloneFlags {
        let flag = |name| match name {
            "ipc" => CloneFlags::CLONE_NEWIPC,
            "uts" => CloneFlags::CLONE_NEWUTS,
            "pid" => CloneFlags::CLONE_NEWPID,
            _ => CloneFlags::empty(),
        };
        self.pinned().map(flag).collect()
    }

    /// Whether no thread of the daemon's can make them.
    pub(super) fn needs_a_process(&self) -> bool {
        self.users == Reach::Pod || self.processes == Processes::Pod
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_an_earlier_version_has_the_nodes_users() {
        let text = r#"{"network":"node","ipc":"pod","processes":"container"}"#;
        let read: Isolation = serde_json::from_str(text).unwrap();
        assert_eq!(read.users, Reach::Node);
        assert!(!read.needs_a_process());
        assert_eq!(read.pinned().collect::<Vec<_>>(), ["ipc"]);
        assert_eq!(read.made(), CloneFlags::CLONE_NEWIPC);
    }
}

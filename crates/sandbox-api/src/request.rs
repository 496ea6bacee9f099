//! The way from containerd's `Create` to the core's request. Owns which pods are refused, by name,
//! and the labels that the CRI's own controller gives a pod.

use std::collections::BTreeMap;

use embedshim_core::id::SandboxKey;
use embedshim_core::sandbox::{CreateSandbox, Dns, IdRange, Network, Processes, Reach, Users};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde::Deserialize;

use crate::grpc::{Code, Status};
use crate::messages::controller;
use crate::messages::cri::{
    DnsConfig, IdMapping, NamespaceMode, NamespaceOption, PodSandboxConfig, UserNamespace,
};

/// The type of a pod's configuration.
const CONFIG: &str = "runtime.v1.PodSandboxConfig";
/// Where the CRI puts what it knows of a pod, as JSON.
const METADATA: &str = "metadata";

/// What is read of the CRI's metadata of a pod.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Metadata {
    #[serde(rename = "ProcessLabel")]
    process_label: Option<String>,
}

/// The core's request.
pub(crate) fn decode(
    key: SandboxKey,
    request: controller::CreateRequest,
) -> Result<CreateSandbox, Status> {
    let options = request.options.into_option().unwrap_or_default();
    let config = config_of(&options)?;
    let linux = config.linux.into_option().unwrap_or_default();
    let context = linux.security_context.into_option().unwrap_or_default();
    let namespaces = context.namespace_options.into_option().unwrap_or_default();
    let mode = |mode: protobuf::EnumOrUnknown<NamespaceMode>| mode.enum_value_or_default();
    let metadata = config.metadata.into_option().unwrap_or_default();
    let sandbox = request.sandbox.into_option().unwrap_or_default();
    let runtime = sandbox.runtime.into_option().unwrap_or_default().name;
    let mut labels: BTreeMap<String, String> = config.labels.into_iter().collect();
    labels.insert("io.cri-containerd.kind".into(), "sandbox".into());
    labels.insert("oci_runtime_type".into(), runtime);
    let label = process_label(sandbox.extensions.get(METADATA));
    labels.insert("selinux_label".into(), label);
    Ok(CreateSandbox {
        key,
        name: format!(
            "{}_{}_{}_{}",
            metadata.name, metadata.namespace, metadata.uid, metadata.attempt
        ),
        hostname: config.hostname,
        network: network(mode(namespaces.network), request.netns_path)?,
        ipc: match mode(namespaces.ipc) {
            NamespaceMode::NODE => Reach::Node,
            _ => Reach::Pod,
        },
        processes: processes(&namespaces),
        users: users(namespaces.userns_options.into_option()),
        cgroup_parent: linux.cgroup_parent,
        dns: config.dns_config.into_option().map(dns),
        sysctls: linux.sysctls.into_iter().collect(),
        labels,
    })
}

fn config_of(options: &Any) -> Result<PodSandboxConfig, Status> {
    let name = options.type_url.rsplit('/').next().unwrap_or_default();
    if name != CONFIG {
        let shown: String = options.type_url.chars().take(200).collect();
        return Err(invalid(format!(
            "options of a sandbox are {shown:?}, {CONFIG} is understood"
        )));
    }
    PodSandboxConfig::parse_from_bytes(&options.value)
        .map_err(|error| invalid(format!("options of a sandbox, {CONFIG}: {error}")))
}

fn network(mode: NamespaceMode, path: String) -> Result<Network, Status> {
    match (mode, path.is_empty()) {
        (NamespaceMode::NODE, true) => Ok(Network::Node),
        (NamespaceMode::NODE, false) => Err(invalid(
            "a pod with the node's network has a network namespace".to_owned(),
        )),
        (_, false) => Ok(Network::Pod(path.into())),
        (_, true) => Err(invalid(
            "a pod with a network of its own has no network namespace".to_owned(),
        )),
    }
}

fn processes(namespaces: &NamespaceOption) -> Processes {
    match namespaces.pid.enum_value_or_default() {
        NamespaceMode::POD => Processes::Pod,
        NamespaceMode::NODE => Processes::Node,
        NamespaceMode::CONTAINER | NamespaceMode::TARGET => Processes::Container,
    }
}

/// The mapping of a user namespace of the pod's own.
fn users(options: Option<UserNamespace>) -> Option<Users> {
    let options = options?;
    let range = |mapping: &IdMapping| IdRange {
        inside: mapping.container_id,
        outside: mapping.host_id,
        size: mapping.length,
    };
    let is_own = options.mode.enum_value_or_default() == NamespaceMode::POD;
    is_own.then(|| Users {
        users: options.uids.iter().map(range).collect(),
        groups: options.gids.iter().map(range).collect(),
    })
}

fn dns(config: DnsConfig) -> Dns {
    Dns {
        servers: config.servers,
        searches: config.searches,
        options: config.options,
    }
}

/// `SELinux`'s label of the pod's processes, which the CRI has chosen; empty without `SELinux`.
fn process_label(metadata: Option<&Any>) -> String {
    let metadata = metadata.and_then(|any| serde_json::from_slice::<Metadata>(&any.value).ok());
    metadata
        .and_then(|metadata| metadata.process_label)
        .unwrap_or_default()
}

fn invalid(text: String) -> Status {
    Status::new(Code::InvalidArgument, text)
}

#[cfg(test)]
mod tests {
    use protobuf::MessageField;

    use super::*;
    use crate::messages::cri::{LinuxPodSandboxConfig, SecurityContext, UserNamespace};

    fn request(namespaces: NamespaceOption, netns_path: &str) -> controller::CreateRequest {
        let mut config = PodSandboxConfig::new();
        let mut linux = LinuxPodSandboxConfig::new();
        let mut context = SecurityContext::new();
        context.namespace_options = MessageField::some(namespaces);
        linux.security_context = MessageField::some(context);
        config.linux = MessageField::some(linux);
        config.labels.insert("app".into(), "web".into());
        let mut request = controller::CreateRequest::new();
        request.netns_path = netns_path.into();
        request.options = MessageField::some(Any {
            type_url: format!("type.googleapis.com/{CONFIG}"),
            value: config.write_to_bytes().unwrap(),
            ..Any::default()
        });
        request
    }

    fn modes(network: NamespaceMode, pid: NamespaceMode) -> NamespaceOption {
        let mut namespaces = NamespaceOption::new();
        namespaces.network = network.into();
        namespaces.pid = pid.into();
        namespaces
    }

    fn decoded(request: controller::CreateRequest) -> Result<CreateSandbox, String> {
        let key = SandboxKey {
            namespace: "k8s.io".parse().unwrap(),
            id: "x".parse().unwrap(),
        };
        decode(key, request).map_err(|status| status.text)
    }

    #[test]
    fn an_ordinary_pod_is_understood() {
        use NamespaceMode::{CONTAINER, NODE, POD};
        let pod = decoded(request(modes(POD, CONTAINER), "/n")).unwrap();
        assert_eq!(
            (pod.network, pod.ipc, pod.processes),
            (Network::Pod("/n".into()), Reach::Pod, Processes::Container)
        );
        assert_eq!(pod.labels["app"], "web");
        assert_eq!(pod.labels["io.cri-containerd.kind"], "sandbox");
        let node = decoded(request(modes(NODE, NODE), "")).unwrap();
        assert_eq!(
            (node.network, node.processes),
            (Network::Node, Processes::Node)
        );
    }

    #[test]
    fn processes_and_users_of_a_pod_are_understood() {
        let mut namespaces = modes(NamespaceMode::POD, NamespaceMode::POD);
        let mut users = UserNamespace::new();
        let mut range = IdMapping::new();
        range.host_id = 200_000;
        range.length = 65_536;
        users.uids.push(range.clone());
        users.gids.push(range);
        namespaces.userns_options = MessageField::some(users);
        let pod = decoded(request(namespaces, "/n")).unwrap();
        assert_eq!(pod.processes, Processes::Pod);
        let range = IdRange {
            inside: 0,
            outside: 200_000,
            size: 65_536,
        };
        let expected = Users {
            users: vec![range],
            groups: vec![range],
        };
        assert_eq!(pod.users, Some(expected));
        let mut namespaces = modes(NamespaceMode::POD, NamespaceMode::CONTAINER);
        let mut node = UserNamespace::new();
        node.mode = NamespaceMode::NODE.into();
        namespaces.userns_options = MessageField::some(node);
        assert_eq!(decoded(request(namespaces, "/n")).unwrap().users, None);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        use NamespaceMode::{CONTAINER, NODE, POD};
        for (namespaces, path, expected) in [
            (modes(POD, CONTAINER), "", "no network namespace"),
            (modes(NODE, CONTAINER), "/n", "has a network namespace"),
        ] {
            let refused = decoded(request(namespaces, path)).unwrap_err();
            assert!(refused.contains(expected), "{refused}");
        }
        let mut other = request(modes(NODE, CONTAINER), "");
        other.options = MessageField::none();
        assert!(decoded(other).unwrap_err().contains(CONFIG));
    }
}

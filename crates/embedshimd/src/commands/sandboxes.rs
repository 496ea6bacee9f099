//! Sandboxes for people: the table of `embedshimd ps --sandboxes`, and what `inspect` says of one.

use std::fmt::Write;

use super::table::Table;
use super::words::{dash, time, time_or_dash, visible};
use crate::admin::documents::{Namespace, Sandbox, SandboxDetail, SandboxList};

/// A line for each sandbox.
pub(super) fn render(sandboxes: &SandboxList) -> String {
    let mut table = Table::new(["NAMESPACE", "ID", "NAME", "STATE", "AGE", "CONTAINERS"]);
    for sandbox in &sandboxes.sandboxes {
        table.push([
            sandbox.namespace.clone(),
            sandbox.id.clone(),
            visible(&sandbox.name),
            state(sandbox),
            time_or_dash(sandbox.age_seconds),
            sandbox.containers.to_string(),
        ]);
    }
    let mut text = table.to_string();
    if !sandboxes.is_enabled {
        text.push_str("\nthe daemon is no sandbox controller: sandbox.enabled is false");
    }
    text
}

/// The state, and the code of one that has lost its namespaces.
fn state(sandbox: &Sandbox) -> String {
    let code = sandbox.exit_code.filter(|code| *code != 0);
    let code = code.map(|code| format!(" ({code})"));
    format!("{}{}", sandbox.state, code.unwrap_or_default())
}

/// All that is known of one.
pub(super) fn render_one(detail: &SandboxDetail) -> String {
    let sandbox = &detail.sandbox;
    let mut text = format!(
        "{} {}: {}\n\n",
        sandbox.namespace,
        sandbox.id,
        state(sandbox)
    );
    let mut lines = vec![
        ("name".to_owned(), visible(&sandbox.name)),
        ("age".to_owned(), time_or_dash(sandbox.age_seconds)),
    ];
    if let Some(ago) = detail.ended_seconds_ago {
        lines.push(("ended".to_owned(), format!("{} ago", time(ago))));
    }
    let record = detail.record.as_deref().map_or_else(dash, visible);
    lines.push(("record".to_owned(), record));
    let tasks = match detail.tasks.as_slice() {
        [] => dash(),
        tasks => tasks.join(", "),
    };
    lines.push(("containers".to_owned(), tasks));
    if let Some(pid) = detail.init_pid {
        lines.push(("init".to_owned(), pid.to_string()));
    }
    // Writing to a string cannot fail.
    let mut write = |title: &str, lines: &[(String, String)]| {
        let _ = write!(text, "{title}");
        let indent = if title.is_empty() { "" } else { "  " };
        let widths = lines.iter().map(|(name, _)| name.chars().count());
        let width = widths.max().unwrap_or(0);
        for (name, value) in lines {
            let _ = writeln!(text, "{indent}{name:width$}  {value}");
        }
    };
    write("", &lines);
    let namespaces: Vec<_> = detail.namespaces.iter().map(namespace).collect();
    write("\nnamespaces\n", &namespaces);
    let mounts = detail.mounts.iter();
    let mounts: Vec<_> = mounts
        .map(|mount| (visible(&mount.target), visible(&mount.source)))
        .collect();
    write("\nfiles\n", &mounts);
    text.trim_end().to_owned()
}

fn namespace(namespace: &Namespace) -> (String, String) {
    let whose = match (&namespace.pin, namespace.is_pinned) {
        (Some(pin), Some(true)) => format!("pinned at {}", visible(pin)),
        (Some(pin), _) => format!("not pinned at {}", visible(pin)),
        (None, _) if namespace.owner == "node" => "the node's".to_owned(),
        (None, _) => format!("one for each {}", visible(&namespace.owner)),
    };
    (namespace.name.clone(), whose)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::documents::{Mount, VERSION};

    fn sandbox(id: &str) -> Sandbox {
        Sandbox {
            namespace: "k8s.io".into(),
            id: id.into(),
            name: "web_default_uid_0".into(),
            state: "ready".into(),
            age_seconds: Some(192.4),
            containers: 2,
            exit_code: None,
        }
    }

    #[test]
    fn each_sandbox_is_a_line() {
        let lost = Sandbox {
            state: "stopped".into(),
            exit_code: Some(255),
            containers: 0,
            ..sandbox("lost")
        };
        let stopped = Sandbox {
            id: "stopped".into(),
            exit_code: Some(0),
            ..lost.clone()
        };
        let all = SandboxList {
            version: VERSION,
            is_enabled: true,
            sandboxes: vec![sandbox("web"), lost, stopped],
        };
        insta::assert_snapshot!("sandboxes", render(&all));
        let none = SandboxList {
            version: VERSION,
            is_enabled: false,
            sandboxes: Vec::new(),
        };
        insta::assert_snapshot!("sandboxes_none", render(&none));
    }

    #[test]
    fn all_that_is_known_of_a_sandbox_is_shown() {
        let namespace = |name: &str, owner: &str, pin: Option<&str>, is_pinned| Namespace {
            name: name.into(),
            owner: owner.into(),
            pin: pin.map(str::to_owned),
            is_pinned,
        };
        let ipc = "/run/embedshim/pods/k8s.io/web/ns/ipc";
        let detail = SandboxDetail {
            version: VERSION,
            sandbox: sandbox("web"),
            record: Some("/run/embedshim/sandboxes/k8s.io:web.json".into()),
            namespaces: vec![
                namespace("net", "pod", Some("/run/netns/cni-1"), Some(false)),
                namespace("ipc", "pod", Some(ipc), Some(true)),
                namespace("uts", "node", None, None),
                namespace("pid", "container", None, None),
            ],
            mounts: vec![Mount {
                target: "/etc/hosts".into(),
                source: "/run/embedshim/pods/k8s.io/web/hosts".into(),
            }],
            tasks: vec!["one".into(), "two".into()],
            init_pid: Some(4711),
            ended_seconds_ago: Some(5.0),
        };
        insta::assert_snapshot!("inspect_sandbox", render_one(&detail));
    }
}

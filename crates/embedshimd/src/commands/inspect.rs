//! `embedshimd inspect`: all that the daemon knows of one task.

use std::fmt::Write;

use anyhow::anyhow;

use super::ps::state;
use super::words::{dash, size, time, time_or_dash, visible};
use super::{document, json};
use crate::admin::documents::{Exit, Process, TaskDetail, Tasks};
use crate::cli;
use crate::outcome::{Code, Failure, print};

/// Asks and shows.
pub(crate) fn run(options: &cli::Inspect) -> Result<Code, Failure> {
    let state_dir = &options.daemon.state_dir;
    let id = &options.id;
    let namespace = match &options.namespace {
        Some(namespace) => namespace.clone(),
        None => namespace_of(&document(state_dir, "/v1/tasks")?, id)?,
    };
    let is_plain = |name: &str| {
        let is_safe = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        !name.is_empty() && name.chars().all(is_safe)
    };
    if !is_plain(&namespace) || !is_plain(id) {
        return Err(anyhow!("{namespace}/{id} is no name of a task").into());
    }
    let detail: TaskDetail = document(state_dir, &format!("/v1/tasks/{namespace}/{id}"))?;
    let text = if options.daemon.json {
        json(&detail)?
    } else {
        render(&detail)
    };
    print(&text)?;
    Ok(Code::Ok)
}

/// The one namespace that has a task of this id.
fn namespace_of(tasks: &Tasks, id: &str) -> anyhow::Result<String> {
    let mut namespaces = tasks
        .tasks
        .iter()
        .filter(|task| task.id == id)
        .map(|task| task.namespace.clone());
    let first = namespaces
        .next()
        .ok_or_else(|| anyhow!("no namespace has a task {id}; `embedshimd ps` lists all"))?;
    let others: Vec<String> = namespaces.collect();
    if others.is_empty() {
        return Ok(first);
    }
    Err(anyhow!(
        "several namespaces have a task {id}: {first}, {}; say which with --namespace",
        others.join(", ")
    ))
}

fn render(detail: &TaskDetail) -> String {
    let task = &detail.task;
    let mut text = format!("{} {}: {}\n\n", task.namespace, task.id, state(task));
    let lines = [
        ("runtime", visible(&task.runtime)),
        ("bundle", visible(&detail.bundle)),
        ("containerd", visible(&detail.containerd)),
        (
            "cgroup",
            detail.cgroup.as_deref().map_or_else(dash, visible),
        ),
        ("memory", task.memory_bytes.map_or_else(dash, size)),
        ("OOM kills", task.oom_kills.to_string()),
    ];
    for (name, value) in lines {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:11} {value}");
    }
    process(&mut text, "init", &detail.init);
    for exec in &detail.execs {
        let name = exec.exec.as_deref().unwrap_or_default();
        process(&mut text, &format!("exec {name}"), exec);
    }
    for call in &detail.runtime_calls {
        let _ = writeln!(
            text,
            "\n`{}` of the OCI runtime is in flight for {}",
            call.operation,
            time(call.seconds)
        );
    }
    text.trim_end().to_owned()
}

fn process(text: &mut String, name: &str, process: &Process) {
    let pid = match process.pid {
        0 => dash(),
        pid => pid.to_string(),
    };
    let stream = |path: &str| {
        if path.is_empty() {
            dash()
        } else {
            visible(path)
        }
    };
    let mut lines = vec![
        ("state", process.state.clone()),
        ("pid", pid),
        ("age", time_or_dash(process.age_seconds)),
    ];
    if let Some(exit) = &process.exit {
        lines.push(("exit", shown(exit)));
    }
    if process.terminal {
        lines.push(("terminal", "yes".to_owned()));
    }
    lines.extend([
        ("stdin", stream(&process.stdin)),
        ("stdout", stream(&process.stdout)),
        ("stderr", stream(&process.stderr)),
    ]);
    for blocked in &process.blocked_streams {
        let what = format!(
            "{} takes nothing for {}",
            blocked.stream,
            time(blocked.seconds)
        );
        lines.push(("blocked", what));
    }
    let _ = writeln!(text, "\n{name}");
    for (name, value) in lines {
        let _ = writeln!(text, "  {name:9} {value}");
    }
}

fn shown(exit: &Exit) -> String {
    let words = exit.status.as_ref().map(|status| format!(" ({status})"));
    let ago = exit.seconds_ago.map(|ago| format!(", {} ago", time(ago)));
    let evidence = exit
        .evidence
        .as_ref()
        .map(|evidence| format!(", known by {evidence}"));
    format!(
        "{}{}{}{}",
        exit.code,
        words.unwrap_or_default(),
        ago.unwrap_or_default(),
        evidence.unwrap_or_default()
    )
}

#[cfg(test)]
mod tests {
    use super::super::ps::tests::task;
    use super::*;
    use crate::admin::documents::{BlockedStream, RuntimeCall, VERSION};

    fn init() -> Process {
        Process {
            exec: None,
            pid: 4_711,
            state: "running".into(),
            age_seconds: Some(192.4),
            exit: None,
            stdin: String::new(),
            stdout: "/run/fifo/web-stdout".into(),
            stderr: "/run/fifo/web-stderr".into(),
            terminal: false,
            blocked_streams: vec![BlockedStream {
                namespace: "k8s.io".into(),
                id: "web".into(),
                exec: None,
                stream: "stdout".into(),
                seconds: 30.0,
            }],
        }
    }

    #[test]
    fn all_that_is_known_of_a_task_is_shown() {
        let exec = Process {
            exec: Some("probe".into()),
            pid: 4_800,
            state: "stopped".into(),
            exit: Some(Exit {
                code: 137,
                status: Some("signal 9".into()),
                evidence: Some("bpf".into()),
                seconds_ago: Some(3.0),
            }),
            terminal: true,
            blocked_streams: Vec::new(),
            ..init()
        };
        let detail = TaskDetail {
            version: VERSION,
            task: task("web"),
            bundle: "/run/containerd/io.containerd.runtime.v2.task/k8s.io/web".into(),
            containerd: "/run/containerd/containerd.sock.ttrpc".into(),
            cgroup: Some("/sys/fs/cgroup/kubepods/web".into()),
            init: init(),
            execs: vec![exec],
            runtime_calls: vec![RuntimeCall {
                namespace: "k8s.io".into(),
                id: "web".into(),
                operation: "exec".into(),
                seconds: 2.0,
            }],
        };
        insta::assert_snapshot!("inspect", render(&detail));
    }

    #[test]
    fn an_id_in_several_namespaces_has_to_be_told_apart() {
        let mut other = task("web");
        other.namespace = "default".into();
        let tasks = Tasks {
            version: VERSION,
            tasks: vec![task("web"), other, task("db")],
        };
        assert_eq!(namespace_of(&tasks, "db").unwrap(), "k8s.io");
        for id in ["web", "none"] {
            let error = namespace_of(&tasks, id).unwrap_err().to_string();
            assert!(error.contains(id), "{error}");
        }
    }
}

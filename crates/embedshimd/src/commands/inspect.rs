//! `embedshimd inspect`: all that the daemon knows of one task, or of one sandbox.

use std::fmt::Write;

use anyhow::anyhow;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::ps::state;
use super::words::{dash, size, time, time_or_dash, visible};
use super::{document, events, json, sandboxes};
use crate::admin::documents::{Exit, Process, SandboxDetail, SandboxList, TaskDetail, Tasks};
use crate::cli;
use crate::outcome::{Code, Failure, print};

/// Asks and shows.
pub(crate) fn run(options: &cli::Inspect) -> Result<Code, Failure> {
    let (state_dir, id) = (&options.daemon.state_dir, &options.id);
    let asked = options.namespace.as_deref();
    let tasks: Tasks = document(state_dir, "/v1/tasks")?;
    let tasks = tasks.tasks.iter().map(|task| (&task.namespace, &task.id));
    if let Some(namespace) = namespace_of("task", tasks, asked, id)? {
        let path = format!("/v1/tasks/{namespace}/{id}");
        return show::<TaskDetail>(options, &path, render);
    }
    let all: SandboxList = document(state_dir, "/v1/sandboxes")?;
    let all = all.sandboxes.iter().map(|one| (&one.namespace, &one.id));
    if let Some(namespace) = namespace_of("sandbox", all, asked, id)? {
        let path = format!("/v1/sandboxes/{namespace}/{id}");
        return show::<SandboxDetail>(options, &path, sandboxes::render_one);
    }
    let place = asked.map_or_else(
        || "no namespace".to_owned(),
        |name| format!("no namespace {name} that"),
    );
    Err(anyhow!(
        "{place} has a task or a sandbox {id}; `embedshimd ps`, with --sandboxes or without, lists \
         all"
    )
    .into())
}

fn show<T: DeserializeOwned + Serialize>(
    options: &cli::Inspect,
    path: &str,
    render: fn(&T) -> String,
) -> Result<Code, Failure> {
    let detail: T = document(&options.daemon.state_dir, path)?;
    let text = if options.daemon.json {
        json(&detail)?
    } else {
        render(&detail)
    };
    print(&text)?;
    Ok(Code::Ok)
}

/// The one namespace that has a thing of this id, or the one that was asked for; `None` if there is
/// none.
fn namespace_of<'a>(
    what: &str,
    all: impl Iterator<Item = (&'a String, &'a String)>,
    asked: Option<&str>,
    id: &str,
) -> anyhow::Result<Option<String>> {
    let mut namespaces = all
        .filter(|(namespace, one)| *one == id && asked.is_none_or(|asked| asked == *namespace))
        .map(|(namespace, _)| namespace.clone());
    let Some(first) = namespaces.next() else {
        return Ok(None);
    };
    let others: Vec<String> = namespaces.collect();
    if others.is_empty() {
        return Ok(Some(first));
    }
    Err(anyhow!(
        "several namespaces have a {what} {id}: {first}, {}; say which with --namespace",
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
            "sandbox",
            detail.sandbox.as_deref().map_or_else(dash, visible),
        ),
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
    if let Some(history) = &detail.history {
        text.push_str(&events::of_task(history));
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
    use super::super::events::tests::event;
    use super::super::ps::tests::task;
    use super::*;
    use crate::admin::documents::{BlockedStream, History, RuntimeCall, VERSION};

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
            sandbox: Some("pod-1".into()),
            cgroup: Some("/sys/fs/cgroup/kubepods/web".into()),
            init: init(),
            execs: vec![exec],
            runtime_calls: vec![RuntimeCall {
                namespace: "k8s.io".into(),
                id: "web".into(),
                operation: "exec".into(),
                seconds: 2.0,
            }],
            history: Some(History {
                since: 1_764_424_000.0,
                events: vec![event("create"), event("start")],
            }),
        };
        insta::assert_snapshot!("inspect", render(&detail));
    }

    #[test]
    fn an_id_in_several_namespaces_has_to_be_told_apart() {
        let mut other = task("web");
        other.namespace = "default".into();
        let tasks = [task("web"), other, task("db")];
        let of = |asked, id| {
            let tasks = tasks.iter().map(|task| (&task.namespace, &task.id));
            namespace_of("task", tasks, asked, id)
        };
        assert_eq!(of(None, "db").unwrap().as_deref(), Some("k8s.io"));
        assert_eq!(of(None, "none").unwrap(), None);
        assert_eq!(of(Some("other"), "web").unwrap(), None);
        let named = of(Some("default"), "web").unwrap();
        assert_eq!(named.as_deref(), Some("default"));
        let error = of(None, "web").unwrap_err().to_string();
        assert!(error.contains("a task web: k8s.io, default"), "{error}");
    }
}

//! `embedshimd status`: the daemon in a screen, and its health as the exit code.

use std::fmt::Write;

use super::words::{count, processes, size, time, visible};
use super::{document, json, pins};
use crate::admin::documents::{Descriptors, Events, Manager, Phase, SandboxStates, States, Status};
use crate::cli;
use crate::outcome::{Code, Failure, print};

/// Asks, shows, and returns the health.
pub(crate) fn run(options: &cli::Status) -> Result<Code, Failure> {
    let status: Status = document(&options.daemon.state_dir, "/v1/status")?;
    let text = if options.daemon.json {
        json(&status)?
    } else {
        format!("{}{}", render(&status), pins::left().unwrap_or_default())
    };
    print(&text)?;
    Ok(if status.problems.is_empty() {
        Code::Ok
    } else {
        Code::Attention
    })
}

/// The status for people.
fn render(status: &Status) -> String {
    let daemon = &status.daemon;
    let doing = match daemon.phase {
        Phase::Starting => "starts",
        Phase::Serving => "serves",
        Phase::Leaving => "leaves",
    };
    let mut text = format!("embedshimd {} {doing}", visible(&daemon.version));
    if status.problems.is_empty() {
        text.push_str(", and all is well\n");
    } else {
        text.push_str("; this needs attention:\n");
        for problem in &status.problems {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "- {}", visible(problem));
        }
    }
    text.push('\n');
    for (name, value) in lines(status) {
        let _ = writeln!(text, "{name:16} {value}");
    }
    for (title, lines) in lists(status) {
        if !lines.is_empty() {
            let _ = writeln!(text, "\n{title}:");
        }
        for line in lines {
            let _ = writeln!(text, "- {line}");
        }
    }
    text.trim_end().to_owned()
}

fn lines(status: &Status) -> Vec<(&'static str, String)> {
    let daemon = &status.daemon;
    let reactor = daemon.reactor_seconds.map_or_else(
        || "does not answer".to_owned(),
        |seconds| format!("answers in {:.1} ms", seconds * 1000.0),
    );
    let monitor = status.monitor.as_ref().map_or_else(
        || "not open yet".to_owned(),
        |monitor| format!("{}: {}", monitor.backend, monitor.promise),
    );
    let watched = status.monitor.as_ref().map_or_else(
        || "nothing yet".to_owned(),
        |monitor| format!("{} of {}", processes(monitor.watched), monitor.capacity),
    );
    let mut lines = vec![
        (
            "process",
            format!(
                "pid {}, up {}, {}",
                daemon.pid,
                time(daemon.uptime_seconds),
                count(daemon.threads as u64, "thread")
            ),
        ),
        ("reactor", reactor),
        ("state directory", visible(&daemon.state_dir)),
        ("kept by", manager(&status.manager)),
        ("restarts", restarts(status)),
        ("exit monitor", monitor),
        ("watched", watched),
        ("tasks", states(&status.tasks)),
        ("execs", states(&status.execs)),
    ];
    if let Some(sandboxes) = &status.sandboxes {
        lines.push(("sandboxes", sandbox_states(sandboxes)));
    }
    lines.extend([
        ("connections", status.connections.to_string()),
        ("descriptors", descriptors(status.descriptors)),
    ]);
    lines
}

fn manager(manager: &Manager) -> String {
    match manager {
        Manager::Systemd => "systemd".to_owned(),
        Manager::Keeper { pid } => format!("embedshimd keep (pid {pid})"),
        Manager::None => "no service manager".to_owned(),
    }
}

fn restarts(status: &Status) -> String {
    let restarts = &status.restarts;
    let last = restarts.last.as_ref().map(|last| {
        format!(
            ", the last {} ago: {}",
            time(last.seconds_ago),
            visible(&last.reason)
        )
    });
    format!("{}{}", restarts.count, last.unwrap_or_default())
}

fn states(states: &States) -> String {
    let all = [
        (states.creating, "creating"),
        (states.created, "created"),
        (states.running, "running"),
        (states.pausing, "pausing"),
        (states.paused, "paused"),
        (states.stopped, "stopped"),
    ];
    counted(&all)
}

fn sandbox_states(states: &SandboxStates) -> String {
    counted(&[
        (states.created, "created"),
        (states.ready, "ready"),
        (states.stopping, "stopping"),
        (states.stopped, "stopped"),
    ])
}

fn counted(all: &[(u64, &str)]) -> String {
    let some: Vec<String> = all
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, state)| format!("{count} {state}"))
        .collect();
    if some.is_empty() {
        return "none".to_owned();
    }
    some.join(", ")
}

fn descriptors(descriptors: Descriptors) -> String {
    let of = |limit: Option<usize>| limit.map_or_else(String::new, |limit| format!(" of {limit}"));
    let open = descriptors
        .open
        .map_or_else(|| "?".to_owned(), |open| open.to_string());
    format!(
        "stored {}{}, open {open} of {}",
        descriptors.stored,
        of(descriptors.store_limit),
        descriptors.open_limit
    )
}

fn lists(status: &Status) -> [(&'static str, Vec<String>); 3] {
    let events = status.events.iter().map(events);
    let calls = status.runtime_calls.iter().map(|call| {
        format!(
            "{} {}: {} for {}",
            call.namespace,
            call.id,
            call.operation,
            time(call.seconds)
        )
    });
    let blocked = status.blocked_streams.iter().map(|stream| {
        let exec = stream.exec.as_ref().map(|exec| format!(" exec {exec}"));
        format!(
            "{} {}{}: {} for {}",
            stream.namespace,
            stream.id,
            exec.unwrap_or_default(),
            stream.stream,
            time(stream.seconds)
        )
    });
    [
        ("events for containerd", events.collect()),
        ("calls of the OCI runtime in flight", calls.collect()),
        ("streams whose other end takes nothing", blocked.collect()),
    ]
}

fn events(events: &Events) -> String {
    let oldest = events
        .oldest_seconds
        .map(|age| format!(", the oldest for {}", time(age)));
    let lost = (events.lost > 0).then(|| format!(", {} lost", events.lost));
    format!(
        "{}: {} wait ({}){}{}",
        visible(&events.address),
        events.waiting,
        size(events.bytes as u64),
        oldest.unwrap_or_default(),
        lost.unwrap_or_default()
    )
}

#[cfg(test)]
pub(crate) mod tests {
    use embedshim_core::exit::Survives;

    use super::*;
    use crate::admin::documents::{
        BlockedStream, Daemon, Monitor, Restart, Restarts, RuntimeCall, VERSION,
    };

    /// A daemon that serves, and needs no attention.
    pub(crate) fn healthy() -> Status {
        Status {
            version: VERSION,
            problems: Vec::new(),
            daemon: Daemon {
                version: "0.1.0".into(),
                pid: 812,
                phase: Phase::Serving,
                uptime_seconds: 11_000.5,
                state_dir: "/run/embedshim".into(),
                threads: 3,
                reactor_seconds: Some(0.000_08),
            },
            restarts: Restarts {
                count: 2,
                recent_failures: 0,
                last: Some(Restart {
                    seconds_ago: 11_000.6,
                    reason: "it was asked to make way (SIGHUP)".into(),
                    was_asked: true,
                }),
            },
            manager: Manager::Keeper { pid: 801 },
            monitor: Some(Monitor {
                backend: "bpf".into(),
                promise: "an exit is recorded while the daemon is dead; exact status; time of the \
                          exit"
                    .into(),
                survives: Survives::Everything,
                watched: 13,
                capacity: 16_384,
            }),
            tasks: States {
                running: 12,
                stopped: 1,
                ..States::default()
            },
            execs: States {
                running: 1,
                ..States::default()
            },
            sandboxes: None,
            connections: 13,
            events: Vec::new(),
            descriptors: Descriptors {
                stored: 30,
                store_limit: Some(10_000),
                open: Some(220),
                open_limit: 1 << 20,
            },
            runtime_calls: Vec::new(),
            blocked_streams: Vec::new(),
        }
    }

    #[test]
    fn a_healthy_daemon_fits_a_screen() {
        insta::assert_snapshot!("status_healthy", render(&healthy()));
    }

    #[test]
    fn what_needs_attention_comes_first() {
        let mut status = healthy();
        status.problems = vec!["3 daemons have ended by themselves".into()];
        status.manager = Manager::Systemd;
        status.events = vec![Events {
            address: "/run/containerd/containerd.sock.ttrpc".into(),
            waiting: 4,
            bytes: 9_000,
            oldest_seconds: Some(61.0),
            acknowledged: 7,
            lost: 2,
        }];
        status.runtime_calls = vec![RuntimeCall {
            namespace: "k8s.io".into(),
            id: "web".into(),
            operation: "create".into(),
            seconds: 200.0,
        }];
        status.blocked_streams = vec![BlockedStream {
            namespace: "k8s.io".into(),
            id: "web".into(),
            exec: Some("shell".into()),
            stream: "stdout".into(),
            seconds: 4.5,
        }];
        status.sandboxes = Some(SandboxStates {
            created: 1,
            ready: 3,
            stopping: 1,
            stopped: 0,
        });
        status.monitor = None;
        status.daemon.reactor_seconds = None;
        status.daemon.phase = Phase::Starting;
        insta::assert_snapshot!("status_attention", render(&status));
    }
}

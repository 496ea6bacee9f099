//! `embedshimd ps`: the tasks of the node, or its sandboxes, a line for each.

use std::io::{self, IsTerminal};
use std::thread::sleep;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::table::Table;
use super::words::{dash, size, time_or_dash};
use super::{document, json, sandboxes};
use crate::admin::documents::{SandboxList, Task, Tasks};
use crate::cli;
use crate::outcome::{Code, Failure, print_while_read};

/// Moves the cursor to the top, and clears the screen from there.
const CLEAR: &str = "\u{1b}[H\u{1b}[J";

/// Asks and shows, once or until it is interrupted.
pub(crate) fn run(options: &cli::Ps) -> Result<Code, Failure> {
    loop {
        let mut text = if options.sandboxes {
            list::<SandboxList>(options, "/v1/sandboxes", sandboxes::render)?
        } else {
            list::<Tasks>(options, "/v1/tasks", render)?
        };
        let Some(pause) = options.watch else {
            print_while_read(&text)?;
            return Ok(Code::Ok);
        };
        if !options.daemon.json && io::stdout().is_terminal() {
            text.insert_str(0, CLEAR);
        }
        if !print_while_read(&text)? {
            return Ok(Code::Ok);
        }
        sleep(Duration::from_secs(pause.max(1)));
    }
}

fn list<T: DeserializeOwned + Serialize>(
    options: &cli::Ps,
    path: &str,
    render: fn(&T) -> String,
) -> Result<String, Failure> {
    let all: T = document(&options.daemon.state_dir, path)?;
    if options.daemon.json {
        return Ok(json(&all)?);
    }
    Ok(render(&all))
}

fn render(tasks: &Tasks) -> String {
    let mut table = Table::new([
        "NAMESPACE",
        "ID",
        "PID",
        "STATE",
        "AGE",
        "EXECS",
        "MEMORY",
        "RUNTIME",
    ]);
    for task in &tasks.tasks {
        table.push([
            task.namespace.clone(),
            task.id.clone(),
            match task.pid {
                0 => dash(),
                pid => pid.to_string(),
            },
            state(task),
            time_or_dash(task.age_seconds),
            task.execs.to_string(),
            task.memory_bytes.map_or_else(dash, size),
            task.runtime.clone(),
        ]);
    }
    table.to_string()
}

/// The state, and of a stopped task the code.
pub(super) fn state(task: &Task) -> String {
    let code = task.exit_code.map(|code| format!(" ({code})"));
    let oom = (task.oom_kills > 0).then_some(" oom");
    format!(
        "{}{}{}",
        task.state,
        code.unwrap_or_default(),
        oom.unwrap_or_default()
    )
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::admin::documents::VERSION;

    pub(in crate::commands) fn task(id: &str) -> Task {
        Task {
            namespace: "k8s.io".into(),
            id: id.into(),
            pid: 4_711,
            state: "running".into(),
            age_seconds: Some(192.4),
            execs: 1,
            memory_bytes: Some(3_565_158),
            oom_kills: 0,
            runtime: "runc".into(),
            exit_code: None,
        }
    }

    #[test]
    fn each_task_is_a_line() {
        let tasks = vec![
            task("web"),
            Task {
                state: "stopped".into(),
                exit_code: Some(137),
                oom_kills: 1,
                memory_bytes: None,
                ..task("hungry")
            },
            Task {
                state: "creating".into(),
                pid: 0,
                age_seconds: None,
                execs: 0,
                memory_bytes: None,
                ..task("slow")
            },
        ];
        let tasks = Tasks {
            version: VERSION,
            tasks,
        };
        insta::assert_snapshot!("ps", render(&tasks));
        let none = Tasks {
            version: VERSION,
            tasks: Vec::new(),
        };
        insta::assert_snapshot!("ps_none", render(&none));
    }
}

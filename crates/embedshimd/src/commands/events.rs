//! `embedshimd events`: what happens to tasks and sandboxes, and the last of what has. Owns the
//! lines; the daemon remembers.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use super::table::Table;
use super::words::{clock, dash, visible};
use super::{document, failure};
use crate::admin::client::{AskError, Lines, ask};
use crate::admin::documents::{Event, EventLine, History, Recent};
use crate::cli;
use crate::outcome::{Code, Failure, print_while_read};

const TITLES: [&str; 7] = [
    "TIME",
    "EVENT",
    "NAMESPACE",
    "ID",
    "EXEC",
    "PID",
    "EXIT CODE",
];
const FOLLOW: &str = "/v1/events/follow";
/// How long no daemon may serve until it is said that the followed one has ended.
const REPLACEMENT: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);
/// The exits of one task that are remembered, to show none twice.
const EXITS: usize = 64;
/// How wide the columns are at least when what comes is not known yet.
const WIDTHS: [usize; 7] = [24, 15, 10, 24, 10, 8, 0];

/// Shows what the daemon remembers, or each event, of one daemon after the other.
pub(crate) fn run(options: &cli::Events) -> Result<Code, Failure> {
    if options.follow {
        return follow(options);
    }
    let recent: Recent = document(&options.daemon.state_dir, "/v1/events")?;
    let skipped = options
        .last
        .map_or(0, |last| recent.events.len().saturating_sub(last));
    let events = recent.events.into_iter().skip(skipped);
    if !options.daemon.json {
        let mut table = Table::new(TITLES);
        events.for_each(|event| table.push(cells(&event)));
        print_while_read(&table.to_string())?;
        return Ok(Code::Ok);
    }
    for event in events {
        if !print_while_read(&json(&EventLine::Event(event))?)? {
            break;
        }
    }
    Ok(Code::Ok)
}

/// Until this process is interrupted, its reader has closed its end, or no daemon is left.
fn follow(options: &cli::Events) -> Result<Code, Failure> {
    let state_dir = &options.daemon.state_dir;
    let path = match options.last {
        None => FOLLOW.to_owned(),
        Some(last) => {
            let recent: Recent = document(state_dir, "/v1/events")?;
            let first = recent.events.len().saturating_sub(last);
            let first = recent.events.get(first);
            from(first.map_or(recent.next, |event| event.number))
        }
    };
    let mut lines = Lines::open(state_dir, &path).map_err(failure)?;
    if !options.daemon.json && !print_while_read(&row(&TITLES.map(str::to_owned)))? {
        return Ok(Code::Ok);
    }
    let mut told = Told::default();
    loop {
        let line = match lines.next() {
            Ok(line) => serde_json::from_str(&line)
                .map_err(AskError::NotUnderstood)
                .map_err(failure)?,
            Err(ended) => {
                let next = wait_for_successor(state_dir)
                    .ok_or(ended)
                    .map_err(failure)?;
                lines = next.lines;
                EventLine::Replaced {
                    daemon_since: next.since,
                }
            }
        };
        if matches!(&line, EventLine::Event(event) if !told.is_new(event)) {
            continue;
        }
        let text = match &line {
            line if options.daemon.json => json(line)?,
            EventLine::Event(event) => row(&cells(event)),
            EventLine::Lost { lost } => format!("({lost} events are missing: they came too fast)"),
            EventLine::Replaced { daemon_since } => format!(
                "(another daemon serves; what happened before {} may be missing, but no exit)",
                clock(*daemon_since)
            ),
        };
        if !print_while_read(&text)? {
            return Ok(Code::Ok);
        }
    }
}

fn from(number: u64) -> String {
    format!("{FOLLOW}/{number}")
}

/// What the daemon after the one that has ended tells, from its first event on.
struct Successor {
    since: f64,
    lines: Lines,
}

/// The keeper or systemd starts it.
fn wait_for_successor(state_dir: &Path) -> Option<Successor> {
    let give_up = Instant::now() + REPLACEMENT;
    loop {
        // No event comes between the two: this begins at the first.
        let found = ask(state_dir, "/v1/events").and_then(|recent: Recent| {
            let since = recent.since;
            Lines::open(state_dir, &from(0)).map(|lines| Successor { since, lines })
        });
        match found {
            Ok(successor) => return Some(successor),
            Err(_) if Instant::now() >= give_up => return None,
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// The exits that were shown of tasks that are not deleted: each daemon that takes these over tells
/// them again.
#[derive(Debug, Default)]
struct Told(HashMap<(String, String), Vec<Event>>);

impl Told {
    /// Whether this was not shown before.
    fn is_new(&mut self, event: &Event) -> bool {
        let task = (event.namespace.clone(), event.id.clone());
        match event.kind.as_str() {
            "exit" => {
                let exits = self.0.entry(task).or_default();
                let is_same = |told: &Event| {
                    (&told.exec, told.pid, told.at.to_bits())
                        == (&event.exec, event.pid, event.at.to_bits())
                };
                let is_new = !exits.iter().any(is_same);
                // A container may have any number of execs in its life.
                if is_new {
                    exits.truncate(EXITS - 1);
                    exits.insert(0, event.clone());
                }
                is_new
            }
            "delete" => {
                self.0.remove(&task);
                true
            }
            _ => true,
        }
    }
}

/// What has happened to one task, for `inspect`.
pub(super) fn of_task(history: &History) -> String {
    let mut table = Table::new(["  TIME", "EVENT", "EXEC", "PID", "EXIT CODE"]);
    for event in &history.events {
        let [exec, pid, code] = particulars(event);
        let time = format!("  {}", clock(event.at));
        table.push([time, visible(&event.kind), exec, pid, code]);
    }
    let since = clock(history.since);
    format!("\nevents, of those that the daemon remembers since {since}\n{table}\n")
}

fn json(line: &EventLine) -> anyhow::Result<String> {
    Ok(serde_json::to_string(line)?)
}

/// An event in columns.
fn cells(event: &Event) -> [String; 7] {
    let [exec, pid, code] = particulars(event);
    [
        clock(event.at),
        visible(&event.kind),
        event.namespace.clone(),
        event.id.clone(),
        exec,
        pid,
        code,
    ]
}

fn particulars(event: &Event) -> [String; 3] {
    let number = |number: Option<u32>| number.map_or_else(dash, |number| number.to_string());
    [
        event.exec.as_deref().map_or_else(dash, visible),
        number(event.pid),
        number(event.exit_code),
    ]
}

fn row(cells: &[String; 7]) -> String {
    let padded = cells.iter().zip(WIDTHS);
    let padded = padded.map(|(cell, width)| format!("{cell:width$}  "));
    padded.collect::<String>().trim_end().to_owned()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::commands) fn event(word: &str) -> Event {
        Event {
            number: 7,
            at: 1_764_425_000.25,
            kind: word.into(),
            namespace: "k8s.io".into(),
            id: "web".into(),
            exec: None,
            pid: Some(4_711),
            exit_code: None,
        }
    }

    #[test]
    fn an_exit_is_shown_once_whatever_daemon_tells_of_it() {
        let mut told = Told::default();
        let exit = event("exit");
        let exec = Event {
            exec: Some("e".into()),
            ..exit.clone()
        };
        assert!(told.is_new(&exit) && told.is_new(&exec));
        assert!(!told.is_new(&exit) && !told.is_new(&exec));
        // Of another container by the same name.
        assert!(told.is_new(&event("delete")) && told.is_new(&exit));
    }

    #[test]
    fn an_event_is_a_line_for_people_and_for_programs() {
        let exit = Event {
            exec: Some("shell".into()),
            exit_code: Some(137),
            ..event("exit")
        };
        let stopped = Event {
            pid: None,
            ..event("sandbox-stopped")
        };
        let mut lines = vec![row(&TITLES.map(str::to_owned))];
        for event in [event("start"), exit, stopped] {
            lines.push(row(&cells(&event)));
            lines.push(json(&EventLine::Event(event)).unwrap());
        }
        lines.push(json(&EventLine::Lost { lost: 3 }).unwrap());
        let replaced = EventLine::Replaced {
            daemon_since: 1_764_425_000.5,
        };
        lines.push(json(&replaced).unwrap());
        insta::assert_snapshot!("events", lines.join("\n"));
        for line in lines.iter().filter(|line| line.starts_with('{')) {
            serde_json::from_str::<EventLine>(line).unwrap();
        }
    }
}

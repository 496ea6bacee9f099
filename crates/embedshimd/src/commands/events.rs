//! `embedshimd events`: what happens to tasks and sandboxes, and the last of what has. Owns the
//! lines; the daemon remembers.

use super::table::Table;
use super::words::{clock, dash, visible};
use super::{document, failure};
use crate::admin::client::{AskError, Lines};
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
/// How wide the columns are at least when what comes is not known yet.
const WIDTHS: [usize; 7] = [24, 15, 10, 24, 10, 8, 0];

/// Shows what the daemon remembers, or each event until the daemon ends.
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

/// Until this process is interrupted, its reader has closed its end, or the daemon ends.
fn follow(options: &cli::Events) -> Result<Code, Failure> {
    let state_dir = &options.daemon.state_dir;
    let path = match options.last {
        None => "/v1/events/follow".to_owned(),
        Some(last) => {
            let recent: Recent = document(state_dir, "/v1/events")?;
            let first = recent.events.len().saturating_sub(last);
            let first = recent.events.get(first);
            let number = first.map_or(recent.next, |event| event.number);
            format!("/v1/events/follow/{number}")
        }
    };
    let mut lines = Lines::open(state_dir, &path).map_err(failure)?;
    if !options.daemon.json && !print_while_read(&row(&TITLES.map(str::to_owned)))? {
        return Ok(Code::Ok);
    }
    loop {
        let line = lines.next().map_err(failure)?;
        let line = serde_json::from_str(&line).map_err(AskError::NotUnderstood);
        let line: EventLine = line.map_err(failure)?;
        let text = match &line {
            line if options.daemon.json => json(line)?,
            EventLine::Event(event) => row(&cells(event)),
            EventLine::Lost { lost } => format!("({lost} events are missing: they came too fast)"),
        };
        if !print_while_read(&text)? {
            return Ok(Code::Ok);
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
        insta::assert_snapshot!("events", lines.join("\n"));
        for line in lines.iter().filter(|line| line.starts_with('{')) {
            serde_json::from_str::<EventLine>(line).unwrap();
        }
    }
}

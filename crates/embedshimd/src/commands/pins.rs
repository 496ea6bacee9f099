//! `embedshimd pins`: the pinned BPF programs of this machine, whose they are, and the removal of
//! those that are left. Owns the table; what is left is [`monitor_bpf`]'s to say.

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;
use monitor_bpf::Pinned;
use serde::Serialize;

use super::json;
use super::table::Table;
use super::words::{dash, visible};
use crate::cli;
use crate::outcome::{Code, Failure, print};

/// One row, and the object of `--json`.
#[derive(Debug, Serialize)]
struct Row {
    pins: String,
    /// `None` if that is not known.
    state_dir: Option<String>,
    /// The processes that use them.
    users: Vec<i32>,
    /// Nothing will use them again.
    is_left: bool,
    is_removed: bool,
}

/// Lists, and removes if that is asked for.
pub(crate) fn run(options: &cli::Pins) -> Result<Code, Failure> {
    let mut rows = Vec::new();
    let is_asked_for = |pinned: &Pinned| options.of.is_none() || pinned.state_dir == options.of;
    for pinned in all()?.into_iter().filter(is_asked_for) {
        let is_left = pinned.is_left();
        let is_removed = is_left && options.remove;
        if is_removed {
            let path = pinned.pin_dir.display();
            monitor_bpf::remove_pins(&pinned.pin_dir)
                .with_context(|| format!("cannot remove {path}"))?;
        }
        rows.push(Row {
            users: pinned
                .users()
                .with_context(|| format!("cannot see who uses {}", pinned.pin_dir.display()))?,
            pins: text(&pinned.pin_dir),
            state_dir: pinned.state_dir.as_deref().map(text),
            is_left,
            is_removed,
        });
    }
    print(&if options.json {
        json(&rows)?
    } else {
        render(&rows)
    })?;
    Ok(Code::Ok)
}

/// What `status` says of those that are left; `None` if there are none, or none are seen.
pub(super) fn left() -> Option<String> {
    let left = all().ok()?.into_iter().filter(Pinned::is_left);
    let mut lines = String::new();
    for pinned in left {
        let of = pinned.state_dir.as_deref().map_or_else(dash, text);
        // Writing to a string cannot fail.
        let _ = write!(lines, "\n- {of}");
    }
    let title = "\n\npins of state directories that are gone, for `embedshimd pins --remove`:";
    (!lines.is_empty()).then(|| format!("{title}{lines}"))
}

fn all() -> anyhow::Result<Vec<Pinned>> {
    monitor_bpf::pinned().context("cannot list the pins in /sys/fs/bpf/embedshim")
}

/// Without what would move a terminal's cursor.
fn text(path: &Path) -> String {
    visible(&path.to_string_lossy())
}

fn render(rows: &[Row]) -> String {
    let mut table = Table::new(["STATE DIRECTORY", "USED BY", "PINS"]);
    for row in rows {
        let users: Vec<String> = row.users.iter().map(i32::to_string).collect();
        let users = match (row.is_removed, row.is_left, users.is_empty()) {
            (true, ..) => "removed".to_owned(),
            (false, true, _) => "nothing: left".to_owned(),
            (false, false, true) => "no process".to_owned(),
            (false, false, false) => format!("pid {}", users.join(", ")),
        };
        let state_dir = row.state_dir.clone().unwrap_or_else(dash);
        table.push([state_dir, users, row.pins.clone()]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_directory_of_pins_is_a_line() {
        let row = |state_dir: Option<&str>, users: &[i32], is_left, is_removed| Row {
            pins: "/sys/fs/bpf/embedshim/x/v1".into(),
            state_dir: state_dir.map(str::to_owned),
            users: users.to_vec(),
            is_left,
            is_removed,
        };
        let rows = [
            row(Some("/run/embedshim"), &[4711, 4712], false, false),
            row(Some("/run/stopped"), &[], false, false),
            row(Some("/tmp/gone"), &[], true, false),
            row(Some("/tmp/away"), &[], true, true),
            row(None, &[], false, false),
        ];
        insta::assert_snapshot!("pins", render(&rows));
        insta::assert_snapshot!("pins_none", render(&[]));
    }
}

//! Who can read and write what the daemon has in the file system: every file of a live state
//! directory, and of the pins, has the mode and the owner that docs/security.md says.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use embedshim_tests::{Stage, Test, write_program};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::machine::find_on_path;
use testbed::products::workspace;
use testbed::sandbox::{PATIENCE, Running, Sandbox, until};

use crate::tests;

pub(crate) const TESTS: [Test; 1] = tests!(EmbedshimOnly:
    every_file_has_the_mode_and_the_owner_that_security_md_says,
);

/// One row of the table in docs/security.md.
struct Row {
    /// Relative to the state directory or to the pins, with `*` for anything but a slash.
    pattern: String,
    is_directory: bool,
    mode: u32,
}

/// The rows of the table below this heading.
fn rows(heading: &str) -> anyhow::Result<Vec<Row>> {
    let text = fs::read_to_string(workspace().join("docs/security.md"))?;
    let (_, rest) = text
        .split_once(&format!("### {heading}\n"))
        .context("no such heading")?;
    let table = rest.split("\n#").next().unwrap_or_default();
    let mut rows = Vec::new();
    for line in table.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let (paths, mode) = (cells[1], cells[2]);
        let (kind, mode) = mode.split_once(' ').context("no mode")?;
        for path in paths.split(", ") {
            rows.push(Row {
                pattern: path.trim_matches('`').trim_end_matches('/').to_owned(),
                is_directory: kind == "directory",
                mode: u32::from_str_radix(mode, 8)?,
            });
        }
    }
    ensure!(rows.len() > 2, "{heading}: {} rows", rows.len());
    Ok(rows)
}

/// Whether a path is of a pattern.
fn is_of(path: &str, pattern: &str) -> bool {
    let Some((before, after)) = pattern.split_once('*') else {
        return path == pattern;
    };
    let Some(rest) = path.strip_prefix(before) else {
        return false;
    };
    let ends = rest.char_indices().map(|(at, _)| at).chain([rest.len()]);
    ends.take_while(|&at| !rest[..at].contains('/'))
        .any(|at| is_of(&rest[at..], after))
}

/// Everything below a directory, and the directory itself.
fn all_below(directory: &Path) -> anyhow::Result<BTreeSet<PathBuf>> {
    let mut all = BTreeSet::from([directory.to_owned()]);
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.symlink_metadata()?.is_dir() {
            all.extend(all_below(&path)?);
        } else {
            all.insert(path);
        }
    }
    Ok(all)
}

/// Compares all that is below a directory with the table, and returns the patterns that were seen.
fn check(directory: &Path, rows: &[Row]) -> anyhow::Result<BTreeSet<String>> {
    let mut seen = BTreeSet::new();
    for path in all_below(directory)? {
        let shown = path.strip_prefix(directory)?.to_string_lossy().into_owned();
        let shown = if shown.is_empty() { "." } else { &shown };
        let Ok(metadata) = path.symlink_metadata() else {
            // A draft, for example.
            continue;
        };
        let row = rows
            .iter()
            .find(|row| is_of(shown, &row.pattern) && row.is_directory == metadata.is_dir())
            .with_context(|| format!("docs/security.md does not know {}", path.display()))?;
        let mode = metadata.mode() & 0o7777;
        ensure!(
            mode == row.mode && metadata.uid() == 0 && metadata.gid() == 0,
            "{shown}: mode {mode:o}, owner {}:{}; docs/security.md says {:o} and root",
            metadata.uid(),
            metadata.gid(),
            row.mode
        );
        seen.insert(row.pattern.clone());
    }
    Ok(seen)
}

/// A sandbox whose containerd, and all that it starts, has a umask that forbids nothing: modes are
/// to depend on the daemon alone.
fn permissive(stage: &Stage) -> anyhow::Result<Sandbox> {
    let mut sandbox = stage.bare_sandbox()?;
    let directory = sandbox.directory().join("permissive");
    fs::create_dir(&directory)?;
    for name in ["containerd", "ctr"] {
        let program = match stage.programs() {
            Some(programs) => programs.join(name),
            None => find_on_path(name).with_context(|| name.to_owned())?,
        };
        let script = format!("#!/bin/sh\numask 0\nexec {} \"$@\"\n", program.display());
        write_program(&directory.join(name), &script)?;
    }
    sandbox.use_programs(Some(directory));
    sandbox.start_containerd()?;
    sandbox.import(stage.archive())?;
    Ok(sandbox)
}

/// Containers that run, an exec, and two daemons one after the other.
fn make_busy(sandbox: &Sandbox) -> anyhow::Result<i32> {
    let pid = sandbox.detached(&["--null-io"], "c", &["sleep", "1000"])?;
    sandbox.detached(&["--null-io"], "d", &["sleep", "1000"])?;
    let mut exec = sandbox.ctr(["task", "exec", "--detach", "--exec-id", "e", "--fifo-dir"]);
    exec.arg(sandbox.directory().join("fifo"))
        .args(["d", "sleep", "1000"]);
    let executed = Running::capture(&mut exec)?.finish(PATIENCE)?;
    ensure!(executed.code == Some(0), "{executed:?}");
    sandbox.kill_daemon()?;
    Ok(pid)
}

fn every_file_has_the_mode_and_the_owner_that_security_md_says(
    stage: &Stage,
) -> anyhow::Result<()> {
    let mut sandbox = permissive(stage)?;
    let pid = make_busy(&sandbox)?;
    let state_dir = sandbox.state_dir();
    let table = rows("The state directory")?;
    let mut seen = check(&state_dir, &table)?;
    // Without containerd there are no connections, and its events wait.
    sandbox.kill_containerd()?;
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    until("an exit waits", || {
        Ok(fs::read_dir(state_dir.join("events"))?.next().is_some())
    })?;
    seen.extend(check(&state_dir, &table)?);
    for pattern in [
        "tasks/*.json",
        "connections/*",
        "events/*",
        "admin.sock",
        "keeper.sock",
        "embedshimd.log",
        "launch.lock",
    ] {
        ensure!(seen.contains(pattern), "{pattern} was not there: {seen:?}");
    }
    let pins = sandbox.pin_dir();
    if pins.is_dir() {
        check(&pins, &rows("The pins")?)?;
    }
    Ok(())
}

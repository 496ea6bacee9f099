//! [`Call`]: one call of the OCI runtime that is under way in this run's sandbox, and for which
//! process of which container. Found by its command line; never stops or kills one.

use std::fs;
use std::path::Path;

use crate::daemon::Victim;
use crate::ledger::Process;

/// The operations that a call can have.
const OPERATIONS: [&str; 10] = [
    "create",
    "start",
    "exec",
    "delete",
    "kill",
    "pause",
    "resume",
    "state",
    "checkpoint",
    "restore",
];

/// A call of the runtime.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) victim: Victim,
    pub(crate) operation: &'static str,
    /// The container, and the exec if it is an exec's start.
    pub(crate) process: Process,
}

/// All calls whose bundles are below this directory.
pub(crate) fn under_way(directory: &Path) -> Vec<Call> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let (operation, process) = parse(&String::from_utf8_lossy(&line), directory)?;
        let victim = Victim::at(pid).filter(|victim| victim.is_alive())?;
        Some(Call {
            victim,
            operation,
            process,
        })
    })
    .collect()
}

/// `runc --root ROOT --log BUNDLE/LOG --log-format json OPERATION ...`; an exec's log is named
/// after it.
fn parse(line: &str, directory: &Path) -> Option<(&'static str, Process)> {
    let mut words = line.split('\0');
    words.next().filter(|program| program.ends_with("runc"))?;
    let log = Path::new(words.by_ref().skip_while(|word| *word != "--log").nth(1)?);
    log.strip_prefix(directory).ok()?;
    let operation = words.find_map(|word| OPERATIONS.into_iter().find(|known| *known == word))?;
    let container = log.parent()?.file_name()?.to_str()?.to_owned();
    let file = log.file_name()?.to_str()?;
    let exec = file
        .strip_prefix(".exec-")
        .and_then(|rest| rest.strip_suffix(".log.json"));
    Some((operation, (container, exec.map(str::to_owned))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(words: &[&str]) -> Option<(&'static str, Process)> {
        parse(&words.join("\0"), Path::new("/tmp/sandbox"))
    }

    #[test]
    fn a_call_is_told_from_its_command_line() {
        let log = "/tmp/sandbox/bundles/d0-1/log.json";
        let start = [
            "runc",
            "--root",
            "/r",
            "--log",
            log,
            "--log-format",
            "json",
            "start",
            "d0-1",
        ];
        assert_eq!(call(&start), Some(("start", ("d0-1".into(), None))));
        let log = "/tmp/sandbox/bundles/d0-1/.exec-e2.log.json";
        let exec = [
            "runc",
            "--log",
            log,
            "--log-format",
            "json",
            "exec",
            "--process",
            "x",
            "d0-1",
        ];
        let process = ("d0-1".to_owned(), Some("e2".to_owned()));
        assert_eq!(call(&exec), Some(("exec", process)));
    }

    #[test]
    fn a_call_of_another_sandbox_and_the_init_are_none() {
        let log = "/tmp/other/bundles/d0-1/log.json";
        assert_eq!(call(&["runc", "--log", log, "start", "d0-1"]), None);
        assert_eq!(call(&["runc", "init"]), None);
        assert_eq!(call(&["embedshimd", "serve", "/tmp/sandbox"]), None);
    }
}

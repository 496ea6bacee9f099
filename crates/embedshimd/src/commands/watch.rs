//! `embedshimd watch`: the exit monitors as a tool. Says how processes end that are no children of
//! this program, and how that is known. Needs no daemon, pins nothing, and ends with the last of
//! them.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use embedshim_core::exit::{Evidence, ExitMonitor, ExitRecord, ExitStatus, Watched};
use embedshim_core::process::{Process, ProcessIdentity};
use monitor_bpf::{AllExits, BpfMonitor, Loading};
use monitor_pidfd::PidfdMonitor;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;

use super::words::{processes, visible};
use crate::cli;
use crate::outcome::{Code, Failure, print_while_read};

/// The longest name that the kernel gives, and the end of its line.
const MAX_NAME: u64 = 64;

/// One line of the output, as JSON.
#[derive(Serialize)]
struct Line<'a> {
    pid: i64,
    command: &'a str,
    /// As shells count; `None` if it is unknown.
    code: Option<u32>,
    status: String,
    evidence: serde_json::Value,
    /// In seconds since the epoch.
    at: f64,
}

/// Watches until all have ended.
pub(crate) fn run(options: &cli::Watch) -> Result<Code, Failure> {
    if options.all {
        return Ok(watch_all(options.json)?);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    Ok(runtime.block_on(watch(options))?)
}

async fn watch(options: &cli::Watch) -> anyhow::Result<Code> {
    // From here on these very processes are meant, even if their numbers are given to others.
    let opened = open(&options.pids)?;
    let monitor = monitor(options.pids.len())?;
    let mut waiting: HashMap<ProcessIdentity, String> = HashMap::new();
    for (process, command) in opened {
        let identity = process.identity();
        match monitor.watch(process).await? {
            Watched::Armed => drop(waiting.insert(identity, command)),
            Watched::Ended(record) => {
                if !show(options.json, &record, &command)? {
                    return Ok(Code::Ok);
                }
            }
        }
    }
    eprintln!(
        "watching {} by {}: {}",
        processes(waiting.len()),
        monitor.backend(),
        monitor.guarantees()
    );
    let mut batch = Vec::new();
    while !waiting.is_empty() {
        batch.clear();
        monitor.next_exits(&mut batch).await?;
        for record in &batch {
            let Some(command) = waiting.remove(&record.process) else {
                continue;
            };
            if !show(options.json, record, &command)? {
                return Ok(Code::Ok);
            }
        }
    }
    Ok(Code::Ok)
}

/// Shows every exit on the machine until the reader closes its end, or this process is interrupted.
fn watch_all(json: bool) -> anyhow::Result<Code> {
    let mut all = AllExits::open(None).context("cannot watch all exits; Linux 5.8 and root can")?;
    eprintln!("watching all processes by bpf");
    let mut lost = 0;
    loop {
        let limit = all.due().map_or(Ok(PollTimeout::NONE), |due| {
            // Rounded up, so that something is due then.
            PollTimeout::try_from(due + Duration::from_millis(1))
        });
        let mut polled = [PollFd::new(all.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, limit.unwrap_or(PollTimeout::MAX)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("cannot wait for exits"),
        }
        for seen in all.take() {
            let exit = Exit {
                pid: i64::try_from(seen.pid).unwrap_or(0),
                status: seen.status,
                evidence: Evidence::Bpf,
            };
            let line = line(json, &exit, &seen.command, seen.at.to_wall())?;
            if !print_while_read(&line)? {
                return Ok(Code::Ok);
            }
        }
        if all.lost() > lost {
            lost = all.lost();
            eprintln!("exits that were not seen, since there were too many at once: {lost}");
        }
    }
}

/// The processes with their names, each once.
fn open(pids: &[i32]) -> anyhow::Result<Vec<(Arc<Process>, String)>> {
    let mut opened: Vec<(Arc<Process>, String)> = Vec::new();
    for pid in pids {
        let process = Process::open(*pid)?;
        let is_there = |(other, _): &(Arc<Process>, String)| other.identity() == process.identity();
        if !opened.iter().any(is_there) {
            let command = command_of(*pid);
            opened.push((Arc::new(process), command));
        }
    }
    Ok(opened)
}

/// BPF around pidfds if that is allowed, else pidfds alone.
fn monitor(count: usize) -> anyhow::Result<Arc<dyn ExitMonitor>> {
    let pidfd = Arc::new(PidfdMonitor::new().context("cannot set up the pidfd exit monitor")?);
    let capacity = u32::try_from(count).unwrap_or(u32::MAX).max(1);
    match BpfMonitor::open_unpinned(capacity, &Loading::default(), pidfd.clone()) {
        Ok(bpf) => Ok(Arc::new(bpf)),
        Err(error) => {
            eprintln!("without BPF: {}", embedshim_core::chain(&error));
            Ok(pidfd)
        }
    }
}

/// The name of a process's program, which it chooses itself.
fn command_of(pid: i32) -> String {
    let mut name = Vec::new();
    if let Ok(file) = File::open(format!("/proc/{pid}/comm")) {
        // It may have ended.
        let _ = file.take(MAX_NAME).read_to_end(&mut name);
    }
    String::from_utf8_lossy(&name).trim_end().to_owned()
}

/// Prints an exit; false if the reader has closed its end.
fn show(json: bool, record: &ExitRecord, command: &str) -> anyhow::Result<bool> {
    let exit = Exit {
        pid: record.process.pid.into(),
        status: record.status,
        evidence: record.evidence,
    };
    print_while_read(&line(json, &exit, command, record.at.to_wall())?)
}

/// How a process ended.
#[derive(Clone, Copy)]
struct Exit {
    pid: i64,
    status: ExitStatus,
    evidence: Evidence,
}

fn line(json: bool, exit: &Exit, command: &str, at: SystemTime) -> anyhow::Result<String> {
    let at = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let Exit { pid, status, .. } = *exit;
    let evidence = serde_json::to_value(exit.evidence)?;
    if !json {
        let evidence = evidence.as_str().unwrap_or_default();
        return Ok(format!(
            "{pid} ({}): {status} at {}.{:03}, known by {evidence}",
            visible(command),
            at.as_secs(),
            at.subsec_millis()
        ));
    }
    let line = Line {
        pid,
        command,
        code: status.is_known().then(|| status.code()),
        status: status.to_string(),
        evidence,
        at: at.as_secs_f64(),
    };
    Ok(serde_json::to_string(&line)?)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use embedshim_core::exit::UnknownReason;

    use super::*;

    #[test]
    fn an_exit_is_a_line_for_people_and_for_programs() {
        let killed = Exit {
            pid: 4711,
            status: ExitStatus::Signaled {
                signal: 9,
                core_dumped: false,
            },
            evidence: Evidence::Bpf,
        };
        let at = UNIX_EPOCH + Duration::from_millis(1_764_425_000_250);
        let unknown = Exit {
            status: ExitStatus::Unknown {
                reason: UnknownReason::NotOurChild,
            },
            evidence: Evidence::None,
            ..killed
        };
        let mut lines = Vec::new();
        for exit in [killed, unknown] {
            for json in [false, true] {
                lines.push(line(json, &exit, "a\u{1b}[2J", at).unwrap());
            }
        }
        insta::assert_snapshot!("watch", lines.join("\n"));
    }
}

//! [`InFlightCalls`]: calls of the OCI runtime that a predecessor has left running. It was killed,
//! they were not. Owns how they are found: by their command lines, of processes that root alone can
//! make. A record could miss one, since the predecessor can die right after it has started
//! it.
//!
//! Everything that a process says of itself can be a lie, and reading it can take any time and
//! memory: an unprivileged process can declare gigabytes to be its arguments (`PR_SET_MM_MAP`), or
//! pages of a file system that does not answer. So what the kernel says comes first: a call has our
//! pid, user and mount namespaces and runs as root. What is left could do as it likes anyway.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::Interest;
use tracing::warn;

use crate::kernel_file;
use crate::process::{HostRoot, Process};
use crate::sys::register;

/// The time between two looks at whether one has ended.
const PAUSE: Duration = Duration::from_millis(2);
/// How long all processes that are about to become another program are waited for.
const BECOMING: Duration = Duration::from_millis(500);
/// The arguments of a call are a few paths and an id: no more of a command line is read.
const MAX_ARGUMENTS: u64 = 32 * 1024;

/// The calls in flight, by the bundle that each has its log in. A predecessor's child that has not
/// become the runtime yet is none of them, and cannot be: until then it has the daemon's lock.
#[derive(Debug, Default)]
pub(crate) struct InFlightCalls(HashMap<PathBuf, Vec<Process>>);

impl InFlightCalls {
    /// All calls in flight. Blocks on procfs: some 10 µs for each process there is.
    pub(crate) fn find() -> Self {
        let mut found: HashMap<PathBuf, Vec<Process>> = HashMap::new();
        let Some(root) = HostRoot::find() else {
            return Self::default();
        };
        let deadline = Instant::now() + BECOMING;
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let directory = entry.path();
            let call = || {
                let is_roots = root.owns(pid);
                is_roots.then(|| bundle_of(&directory, deadline)).flatten()
            };
            let Some(bundle) = call() else {
                continue;
            };
            // Its number could have got another process meanwhile.
            if let Ok(process) = Process::open(pid)
                && call().as_ref() == Some(&bundle)
            {
                found.entry(bundle).or_default().push(process);
            }
        }
        Self(found)
    }

    /// Those of one bundle.
    pub(crate) fn take(&mut self, bundle: &Path) -> Vec<Process> {
        self.0.remove(bundle).unwrap_or_default()
    }
}

/// Whether any CRIU of this host's root runs: one goes on when the runtime is killed that has
/// called it, and nothing says for which container. Blocks on procfs.
pub(crate) fn is_criu_at_work() -> bool {
    let Some(root) = HostRoot::find() else {
        return false;
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter(|entry| {
            kernel_file::read_bytes(entry.path().join("comm")).is_ok_and(|name| name == b"criu\n")
        })
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .any(|pid| root.owns(pid))
}

/// Waits until these calls have ended; at the limit they are killed, with the hooks they run.
pub(crate) async fn wait_for(calls: &[Process], limit: Duration) {
    let ended = async {
        for call in calls {
            end_of(call).await;
        }
    };
    if tokio::time::timeout(limit, ended).await.is_ok() {
        return;
    }
    for call in calls {
        let pid = call.identity().pid;
        if !call.has_ended().unwrap_or(true) {
            warn!(
                pid,
                "a predecessor's call of the OCI runtime does not end: killing it"
            );
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Waits for the end of a process: as long as it runs, nothing is done here.
async fn end_of(call: &Process) {
    let pidfd = call
        .pidfd()
        .and_then(|pidfd| pidfd.try_clone_to_owned().ok());
    let readable = pidfd.and_then(|pidfd| register(Arc::new(pidfd), Interest::READABLE).ok());
    if let Some(readable) = readable {
        let _ = readable.readable().await;
    }
    // Where there are no pidfds.
    while !call.has_ended().unwrap_or(true) {
        tokio::time::sleep(PAUSE).await;
    }
}

/// The directory of the file after `--log` in a process's command line.
///
/// Within `execve` a process has none for a moment, but has let go of the daemon's lock already.
/// Kernel threads have none either, nor a program that they execute.
fn bundle_of(process: &Path, deadline: Instant) -> Option<PathBuf> {
    let mut line = arguments(process)?;
    while line.is_empty() && Instant::now() < deadline && fs::read_link(process.join("exe")).is_ok()
    {
        std::thread::sleep(PAUSE);
        line = arguments(process)?;
    }
    let mut words = line.split(|&byte| byte == 0);
    words.find(|word| *word == b"--log")?;
    let bundle = Path::new(OsStr::from_bytes(words.next()?)).parent()?;
    bundle.is_absolute().then(|| bundle.to_owned())
}

fn arguments(process: &Path) -> Option<Vec<u8>> {
    let mut line = Vec::new();
    let file = File::open(process.join("cmdline")).ok()?;
    file.take(MAX_ARGUMENTS).read_to_end(&mut line).ok()?;
    Some(line)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use super::*;

    #[tokio::test]
    async fn a_call_is_found_by_its_bundle_and_waited_for() {
        let bundle = tempfile::tempdir().unwrap();
        let log = bundle.path().join("log.json");
        // A shell that says it is the runtime. It forks nothing: until it executes its program, a
        // child would say so as well.
        let mut call = Command::new("sh")
            .args(["-c", "read line", "--log"])
            .arg(&log)
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut found = Vec::new();
        // Between fork and exec it is still us.
        while found.is_empty() {
            found = InFlightCalls::find().take(bundle.path());
        }
        let pids: Vec<u32> = found
            .iter()
            .map(|found| found.identity().pid.unsigned_abs())
            .collect();
        assert_eq!(pids, [call.id()]);
        drop(call.stdin.take());
        wait_for(&found, Duration::from_secs(30)).await;
        assert!(found[0].has_ended().unwrap());
        call.wait().unwrap();
    }

    #[test]
    fn a_process_of_another_user_is_no_call_whatever_it_says() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped, because only root can be another user");
            return;
        }
        let bundle = tempfile::tempdir().unwrap();
        let mut stranger = Command::new("sh")
            .args(["-c", "sleep 100; true", "--log"])
            .arg(bundle.path().join("log.json"))
            .uid(65534)
            .spawn()
            .unwrap();
        let proc = PathBuf::from(format!("/proc/{}", stranger.id()));
        let deadline = Instant::now() + Duration::from_secs(30);
        // Between fork and exec it is still us.
        while bundle_of(&proc, deadline).is_none() {
            assert!(Instant::now() < deadline, "it does not run");
        }
        let found = InFlightCalls::find().take(bundle.path());
        stranger.kill().unwrap();
        stranger.wait().unwrap();
        assert!(found.is_empty());
    }
}

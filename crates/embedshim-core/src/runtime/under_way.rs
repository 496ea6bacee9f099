//! Calls of the OCI runtime that a predecessor has left running: it was killed, they were not. Owns how they are found, by what they say of
//! themselves in `/proc`; no record of ours could be as complete, since the predecessor can die right after it has started one.

use std::collections::HashMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tracing::warn;

use crate::process::Process;

/// The time between two looks at whether one has ended.
const PAUSE: Duration = Duration::from_millis(2);

/// The calls under way, by the bundle that each has its log in. A predecessor's child that has not become the runtime yet is none of them,
/// and cannot be: until then it has the daemon's lock.
#[derive(Debug, Default)]
pub(crate) struct UnderWay(HashMap<PathBuf, Vec<Process>>);

impl UnderWay {
    /// All calls under way. Blocks on procfs: some 10 µs for each process there is.
    pub(crate) fn find() -> Self {
        let mut found: HashMap<PathBuf, Vec<Process>> = HashMap::new();
        let own_namespace = fs::read_link("/proc/self/ns/pid").ok();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let directory = entry.path();
            let Some(bundle) = bundle_of(&directory) else {
                continue;
            };
            // What runs in a container can call itself anything.
            if fs::read_link(directory.join("ns/pid")).ok() != own_namespace {
                continue;
            }
            // Its number could have got another process meanwhile.
            if let Ok(process) = Process::open(pid)
                && bundle_of(&directory).as_ref() == Some(&bundle)
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

/// Waits until these calls have ended; at the limit they are killed, with the hooks they run.
pub(crate) async fn wait_for(calls: &[Process], limit: Duration) {
    let ended = async {
        for call in calls {
            while !call.has_ended().unwrap_or(true) {
                tokio::time::sleep(PAUSE).await;
            }
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

/// The directory of the file after `--log` in a process's command line.
fn bundle_of(process: &Path) -> Option<PathBuf> {
    let line = fs::read(process.join("cmdline")).ok()?;
    let mut words = line.split(|&byte| byte == 0);
    words.find(|word| *word == b"--log")?;
    let log = Path::new(std::ffi::OsStr::from_bytes(words.next()?));
    let bundle = log.parent()?;
    bundle.is_absolute().then(|| bundle.to_owned())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[tokio::test]
    async fn a_call_is_found_by_its_bundle_and_waited_for() {
        let bundle = tempfile::tempdir().unwrap();
        let log = bundle.path().join("log.json");
        // A shell that says it is the runtime, and stays one: with two commands it does not become the first.
        let mut call = Command::new("sh")
            .args(["-c", "sleep 0.2; true", "--log"])
            .arg(&log)
            .spawn()
            .unwrap();
        let mut found = Vec::new();
        // Between fork and exec it is still us.
        while found.is_empty() {
            found = UnderWay::find().take(bundle.path());
        }
        let pids: Vec<u32> = found
            .iter()
            .map(|found| found.identity().pid.unsigned_abs())
            .collect();
        assert_eq!(pids, [call.id()]);
        wait_for(&found, Duration::from_secs(30)).await;
        assert!(found[0].has_ended().unwrap());
        call.wait().unwrap();
    }
}

//! The process group of one call of the runtime. Owns how it is killed, and how its end is found
//! out; never starts a call.

use std::fs;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::Child;
use tokio::time::{sleep, timeout};

use crate::blocking::blocking;
use crate::kernel_file;
use crate::process::parse_stat_field;

/// The field of `/proc/PID/stat` with the process group.
const GROUP: usize = 5;
/// The time between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// Kills the runtime, and as it has a process group of its own, hooks and `runc init` with it.
pub(super) fn kill(child: &Child) {
    if let Some(group) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
}

/// Waits until no process of the group runs, at most for so long. CRIU goes on when the runtime is
/// killed that has asked for it, and lets the container's processes go when it ends: killed itself,
/// it would leave its own code in them.
pub(super) async fn wait_for_end(leader: Option<u32>, limit: Duration) {
    let Some(group) = leader.and_then(|pid| i32::try_from(pid).ok()) else {
        return;
    };
    let ended = async {
        while blocking(move || has_members(group)).await.unwrap_or(false) {
            sleep(PAUSE).await;
        }
    };
    let _ = timeout(limit, ended).await;
}

/// Whether a process of this group runs. A zombie does not, and may not be reaped before the call
/// is over. Blocks on procfs.
fn has_members(group: i32) -> bool {
    if killpg(Pid::from_raw(group), None).is_err() {
        return false;
    }
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter(|entry| {
            let name = entry.file_name();
            name.as_encoded_bytes().iter().all(u8::is_ascii_digit)
        })
        .filter_map(|entry| kernel_file::read_bytes(entry.path().join("stat")).ok())
        .any(|stat| {
            let is_zombie = stat
                .rsplit(|&byte| byte == b')')
                .next()
                .is_some_and(|rest| matches!(rest.get(1), Some(b'Z' | b'X')));
            !is_zombie && parse_stat_field(&stat, GROUP) == u64::try_from(group).ok()
        })
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_group_has_members_until_the_last_of_them_has_ended() {
        let mut leader = Command::new("true").process_group(0).spawn().unwrap();
        let group = i32::try_from(leader.id()).unwrap();
        let mut member = Command::new("sleep")
            .arg("1000")
            .process_group(group)
            .spawn()
            .unwrap();
        leader.wait().unwrap();
        assert!(has_members(group));
        member.kill().unwrap();
        while has_members(group) {
            std::thread::sleep(PAUSE);
        }
        // It is a zombie still.
        assert!(killpg(Pid::from_raw(group), None).is_ok());
        member.wait().unwrap();
        assert!(!has_members(group));
    }
}

//! Whether a process that was killed is held up in the kernel, for example by a file system that
//! does not answer. Owns what counts as that; waits for nothing.

use std::fs;
use std::path::Path;

use super::stat::stat_state;

/// Whether each thread of the process has ended, or sleeps uninterruptibly with SIGKILL pending.
/// False if there is no such process.
pub(super) fn is_held_up(pid: i32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let mut threads = threads.into_iter().flatten().flatten().peekable();
    threads.peek().is_some() && threads.all(|thread| is_thread_held_up(&thread.path()))
}

fn is_thread_held_up(thread: &Path) -> bool {
    // One that is gone since the directory was read has ended.
    let Ok(stat) = fs::read(thread.join("stat")) else {
        return true;
    };
    match stat_state(&stat) {
        Some(b'Z' | b'X') => true,
        Some(b'D') => is_killed(&fs::read_to_string(thread.join("status")).unwrap_or_default()),
        _ => false,
    }
}

/// A fatal signal is pending for each thread by itself.
fn is_killed(status: &str) -> bool {
    const BIT: u64 = 1 << (libc::SIGKILL - 1);
    let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:"));
    let pending = pending.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    pending.is_some_and(|signals| signals & BIT != 0)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn pid(child: &Child) -> i32 {
        i32::try_from(child.id()).unwrap()
    }

    #[test]
    fn a_process_that_runs_or_is_gone_is_not_held_up() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        assert!(!is_held_up(pid(&child)));
        child.kill().unwrap();
        while fs::read(format!("/proc/{}/stat", child.id()))
            .is_ok_and(|stat| stat_state(&stat) != Some(b'Z'))
        {
            std::thread::yield_now();
        }
        assert!(is_held_up(pid(&child)));
        child.wait().unwrap();
        assert!(!is_held_up(pid(&child)));
    }

    #[test]
    fn an_uninterruptible_sleep_alone_is_no_end() {
        let of =
            |pending: &str| format!("Name:\tx\nSigPnd:\t{pending}\nShdPnd:\t0000000000000100\n");
        assert!(is_killed(&of("0000000000000100")));
        assert!(is_killed(&of("0000000000004100")));
        for pending in ["0000000000000000", "0000000000004000", "", "x"] {
            assert!(!is_killed(&of(pending)), "{pending}");
        }
    }
}

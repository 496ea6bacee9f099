//! How an ended process ended, asked of every source that may know, in the order of their
//! authority.

use std::fs;
use std::io;
use std::sync::LazyLock;

use exit_monitor::process::{Process, parse_stat_field};
use exit_monitor::{Evidence, ExitStatus, UnknownReason};
use nix::sys::utsname::uname;
use tracing::debug;

use crate::sys::{self, Target, Zombie};

/// Fields of `/proc/PID/stat` (proc(5)).
const START_TIME: usize = 22;
const EXIT_CODE: usize = 52;

/// How a process ended, and who says so.
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) evidence: Evidence,
    /// It is our child, a zombie until it is reaped.
    pub(crate) is_our_zombie: bool,
}

/// The kernel shows the group's status of a zombie that stays one. Before 5.17, waitid(2) with
/// WNOWAIT and field 52 of `/proc/PID/stat` have the main thread's own.
static ZOMBIES_SHOW_THE_GROUP: LazyLock<bool> = LazyLock::new(|| {
    let release = uname().map(|found| found.release().to_string_lossy().into_owned());
    release.is_ok_and(|release| is_at_least(&release, (5, 17)))
});

fn is_at_least(release: &str, wanted: (u32, u32)) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= wanted,
        _ => false,
    }
}

/// The status of a process whose pidfd is readable.
pub(crate) fn of_ended(process: &Process) -> Ended {
    let known = |raw, evidence| Ended {
        status: ExitStatus::from_wait_status(raw),
        evidence,
        is_our_zombie: false,
    };
    // Our child. It stays a zombie, which is all there is of its status until the caller has
    // written that down.
    if let Some(raw) = logged("waitid", process, wait(process, Zombie::Stays)) {
        let evidence = if *ZOMBIES_SHOW_THE_GROUP {
            Evidence::Wait
        } else {
            Evidence::Zombie
        };
        return Ended {
            is_our_zombie: true,
            ..known(raw, evidence)
        };
    }
    // Before what the kernel keeps, which is right almost always only.
    if let Some(raw) = of_zombie(process) {
        return known(raw, Evidence::Zombie);
    }
    if let Some(raw) = exit_info(process) {
        return known(raw, Evidence::PidfdInfo);
    }
    Ended {
        status: ExitStatus::Unknown {
            reason: UnknownReason::NotOurChild,
        },
        evidence: Evidence::None,
        is_our_zombie: false,
    }
}

/// Reaps our child, if it is that and has ended.
pub(crate) fn reap(process: &Process) -> io::Result<Option<i32>> {
    wait(process, Zombie::Reaped)
}

/// The status of our child. By its number before Linux 5.4: that is its own as long as it is not
/// reaped.
fn wait(process: &Process, zombie: Zombie) -> io::Result<Option<i32>> {
    if let Some(pidfd) = process.pidfd() {
        match sys::wait(Target::Pidfd(pidfd), zombie) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            other => return other,
        }
    }
    let identity = process.identity();
    let stat = match fs::read(format!("/proc/{}/stat", identity.pid)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    if parse_stat_field(&stat, START_TIME) != Some(identity.start_ticks) {
        return Ok(None);
    }
    sys::wait(Target::Number(identity.pid), zombie)
}

/// What the kernel keeps for the pidfds of a reaped process, since 6.15.
fn exit_info(process: &Process) -> Option<i32> {
    logged("PIDFD_GET_INFO", process, sys::exit_info(process.pidfd()?))
}

/// What a zombie that is another process's child still shows.
fn of_zombie(process: &Process) -> Option<i32> {
    let identity = process.identity();
    let stat = fs::read(format!("/proc/{}/stat", identity.pid)).ok()?;
    if parse_stat_field(&stat, START_TIME)? != identity.start_ticks {
        return None;
    }
    let raw = i32::try_from(parse_stat_field(&stat, EXIT_CODE)?).ok()?;
    // Who may not trace it reads 0 (do_task_stat() in fs/proc/array.c), and may not read this link
    // either.
    if raw == 0 {
        fs::read_link(format!("/proc/{}/ns/user", identity.pid)).ok()?;
    }
    // The file was read by number: it was this process's only if that is unreaped even now.
    process.signal(0).ok().map(|()| raw)
}

fn logged(call: &'static str, process: &Process, result: io::Result<Option<i32>>) -> Option<i32> {
    result.unwrap_or_else(|error| {
        debug!(call, pid = process.identity().pid, %error, "the kernel does not report the exit status");
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_as_numbers() {
        for new in ["5.17.0", "5.17-rc1", "6.1.0-32-amd64", "10.0.1"] {
            assert!(is_at_least(new, (5, 17)), "{new}");
        }
        for old in ["5.10.0-32-cloud-amd64", "5.9", "4.19.0", "", "five"] {
            assert!(!is_at_least(old, (5, 17)), "{old}");
        }
    }
}

//! How an ended process ended, asked of everybody who may know, in the order of their authority.

use std::fs;
use std::io;

use embedshim_core::exit::{Evidence, ExitStatus, UnknownReason};
use embedshim_core::process::{Process, parse_stat_field};
use tracing::debug;

use crate::sys::{self, Target, Zombie};

/// Fields of `/proc/PID/stat` (proc(5)).
const START_TIME: usize = 22;
const EXIT_CODE: usize = 52;

/// The status of a process whose pidfd is readable.
pub(crate) fn of_ended(process: &Process) -> (ExitStatus, Evidence) {
    let known = |raw, evidence| (ExitStatus::from_wait_status(raw), evidence);
    // Our child. It stays a zombie, which is all there is of its status until somebody has written that down.
    if let Some(raw) = logged("waitid", process, wait(process, Zombie::Stays)) {
        return known(raw, Evidence::Wait);
    }
    // Before what the kernel keeps, which is right almost always only.
    if let Some(raw) = of_zombie(process) {
        return known(raw, Evidence::Zombie);
    }
    if let Some(raw) = exit_info(process) {
        return known(raw, Evidence::PidfdInfo);
    }
    (
        ExitStatus::Unknown {
            reason: UnknownReason::NotOurChild,
        },
        Evidence::None,
    )
}

/// Reaps our child, if it is that and has ended.
pub(crate) fn reap(process: &Process) -> io::Result<Option<i32>> {
    wait(process, Zombie::Reaped)
}

/// The status of our child. By its number before Linux 5.4: that is its own as long as it is not reaped.
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

/// What a zombie that is somebody else's child still shows.
fn of_zombie(process: &Process) -> Option<i32> {
    let identity = process.identity();
    let stat = fs::read(format!("/proc/{}/stat", identity.pid)).ok()?;
    if parse_stat_field(&stat, START_TIME)? != identity.start_ticks {
        return None;
    }
    let raw = i32::try_from(parse_stat_field(&stat, EXIT_CODE)?).ok()?;
    // Who may not trace it reads 0 (do_task_stat() in fs/proc/array.c), and may not read this link either.
    if raw == 0 {
        fs::read_link(format!("/proc/{}/ns/user", identity.pid)).ok()?;
    }
    // The file was read by number: it was this process's only if that is unreaped even now.
    process.signal(0).ok().map(|()| raw)
}

fn logged(call: &'static str, process: &Process, result: io::Result<Option<i32>>) -> Option<i32> {
    result.unwrap_or_else(|error| {
        debug!(call, pid = process.identity().pid, %error, "does not tell the exit status");
        None
    })
}

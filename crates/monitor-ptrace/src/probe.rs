//! Whether this machine lets this process trace, found out by tracing a child.

use std::fs;
use std::io;

use exit_monitor::{Availability, Backend, Feature};

use crate::monitor::GUARANTEES;
use crate::sys;

type Tried = Result<(), (String, Option<String>)>;

/// Tries everything this backend needs.
pub fn probe() -> Availability {
    let seized: Tried = try_seizing().map_err(|error| {
        let remedy = "grant CAP_SYS_PTRACE, or allow ptrace in the seccomp filter";
        (error.to_string(), Some(remedy.to_owned()))
    });
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let allowed: Tried = match scope.trim() {
        "3" => Err((
            "kernel.yama.ptrace_scope is 3".into(),
            Some("reboot with a lower kernel.yama.ptrace_scope: 3 cannot be taken back".into()),
        )),
        _ => Ok(()),
    };
    let verdict = match (&seized, &allowed) {
        (Err((why, _)), _) => Err(format!("PTRACE_SEIZE: {why}")),
        (_, Err((why, _))) => Err(why.clone()),
        (Ok(()), Ok(())) => Ok(GUARANTEES),
    };
    let remedies = [&seized, &allowed].into_iter();
    let remedies = remedies.filter_map(|tried| tried.as_ref().err()?.1.clone());
    let remedies = remedies.collect();
    let features = vec![
        Feature::tried(
            "PTRACE_SEIZE",
            "3.4",
            "to learn how others' children end",
            seized,
        ),
        Feature::tried(
            "yama ptrace_scope",
            "3.4",
            "to trace others' children at all",
            allowed,
        ),
    ];
    Availability {
        backend: Backend::Ptrace,
        features,
        verdict,
        remedies,
    }
}

fn try_seizing() -> io::Result<()> {
    let child = sys::fork_and_pause()?;
    let seized = sys::seize(child);
    let status = sys::kill_and_reap(child)?;
    seized?;
    if status != libc::SIGKILL {
        return Err(io::Error::other(format!(
            "a child that was killed showed {status:#x}"
        )));
    }
    Ok(())
}

//! What this kernel can do for pidfds, found out by doing it with a child that ends at once.

use std::io;

use embedshim_core::exit::{Availability, Backend, Feature, Guarantees, Survives};
use embedshim_core::process::{OpenError, Process};

use crate::sys;

/// The code of the child that is used for trying; unlikely to come from anywhere else.
const CODE: u8 = 42;

type Tried = Result<(), (String, Option<String>)>;

/// Tries everything this backend needs.
pub fn probe() -> Availability {
    let open = open_self();
    let child = try_child();
    let inode = match &open {
        Ok(process) if process.identity().inode.is_some() => Ok(()),
        _ => Err(("pidfds of this kernel share one inode".to_owned(), None)),
    };
    let newer = |since: &str| Some(format!("run Linux {since} or newer"));
    let failed = |error: String, since: &str| (error, newer(since));
    let opened: Tried = open
        .as_ref()
        .map(|_| ())
        .map_err(|error| failed(error.to_string(), "5.3"));
    let waited: Tried = child
        .as_ref()
        .map(|_| ())
        .map_err(|error| failed(error.to_string(), "5.4"));
    let kept: Tried = match &child {
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err(failed(
            "the kernel forgets a process that is reaped".into(),
            "6.15",
        )),
        Err(error) => Err(failed(error.to_string(), "6.15")),
    };
    let verdict = match (&opened, &waited) {
        (Err((why, _)), _) => Err(format!("pidfd_open: {why}")),
        (_, Err((why, _))) => Err(format!("waitid(P_PIDFD): {why}")),
        (Ok(()), Ok(())) => Ok(guarantees_if(kept.is_ok())),
    };
    let remedies = match &kept {
        Err((_, Some(remedy))) => vec![format!(
            "{remedy}, for the status of processes that are not our children"
        )],
        _ => Vec::new(),
    };
    let features = vec![
        Feature::tried(
            "pidfd_open",
            "5.3",
            "to see that a process has ended",
            opened,
        ),
        Feature::tried(
            "waitid(P_PIDFD)",
            "5.4",
            "the status of our children",
            waited,
        ),
        Feature::tried(
            "pidfs inode",
            "6.9",
            "to tell processes apart for ever",
            inode,
        ),
        Feature::tried(
            "PIDFD_INFO_EXIT",
            "6.15",
            "the status of everybody else",
            kept,
        ),
    ];
    Availability {
        backend: Backend::Pidfd,
        features,
        verdict,
        remedies,
    }
}

/// What the monitor promises on this kernel.
pub(crate) fn guarantees() -> Guarantees {
    guarantees_if(matches!(try_child(), Ok(Some(_))))
}

fn guarantees_if(kept_by_the_kernel: bool) -> Guarantees {
    Guarantees {
        survives: if kept_by_the_kernel {
            Survives::WithDescriptors
        } else {
            Survives::Nothing
        },
        exact_for_others: kept_by_the_kernel,
        exact_time: false,
    }
}

fn open_self() -> Result<Process, OpenError> {
    Process::open(i32::try_from(std::process::id()).unwrap_or(0))
}

/// Reaps a child by pidfd, then asks the kernel what it remembers of it.
fn try_child() -> io::Result<Option<i32>> {
    let pid = sys::fork_and_exit(CODE)?;
    let process = Process::open(pid).map_err(io::Error::other)?;
    while !process.has_ended()? {
        std::thread::yield_now();
    }
    let expected = i32::from(CODE) << 8;
    match sys::reap(process.pidfd())? {
        Some(status) if status == expected => {}
        other => {
            return Err(io::Error::other(format!(
                "a child that ended with {CODE} showed {other:?}"
            )));
        }
    }
    Ok(sys::exit_info(process.pidfd())?.filter(|&status| status == expected))
}

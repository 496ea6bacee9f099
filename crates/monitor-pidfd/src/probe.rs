//! What this kernel can do for pidfds, found out by doing it with a child that ends at once.

use std::io;

use exit_monitor::process::{OpenError, Process};
use exit_monitor::{Availability, Backend, Exactness, Feature, Guarantees, Survives};

use crate::status;
use crate::sys::{self, Target, Zombie};

/// The code of the child that is used for trying; unlikely to come from anywhere else.
const CODE: u8 = 42;

type Tried = Result<(), (String, Option<String>)>;

/// Tries everything this backend needs. It runs everywhere; what is missing makes it slower or less
/// certain.
pub fn probe() -> Availability {
    let child = try_child();
    let missing = |why: &str, since: &str| Err((why.to_owned(), Some(newer(since))));
    let opened: Tried = match open_self() {
        Ok(process) if process.pidfd().is_some() => Ok(()),
        Ok(_) => missing("the kernel has no pidfds", "5.3"),
        Err(error) => missing(&error.to_string(), "5.3"),
    };
    let waited: Tried = match &child {
        Ok(child) if child.by_pidfd => Ok(()),
        Ok(_) => missing("children are waited for by number", "5.4"),
        Err(error) => missing(&error.to_string(), "5.4"),
    };
    let inode: Tried = match open_self() {
        Ok(process) if process.identity().inode.is_some() => Ok(()),
        _ => missing("pidfds share one inode, or are none", "6.9"),
    };
    let kept: Tried = match &child {
        Ok(child) if child.is_kept => Ok(()),
        Ok(_) => missing("the kernel forgets a process that is reaped", "6.15"),
        Err(error) => missing(&error.to_string(), "6.15"),
    };
    let verdict = match &child {
        Ok(child) => Ok(guarantees_if(child.is_kept)),
        Err(error) => Err(format!("not even a child can be waited for: {error}")),
    };
    let improve = |tried: &Tried, what| {
        let (_, remedy) = tried.as_ref().err()?;
        Some(format!("{}, {what}", remedy.as_ref()?))
    };
    let remedies = [
        improve(&opened, "to see ends at once and not by looking"),
        improve(
            &kept,
            "for the status of processes that are not our children",
        ),
    ];
    let features = vec![
        Feature::tried(
            "pidfd_open",
            "5.3",
            "to see at once that a process has ended",
            opened,
        ),
        Feature::tried(
            "waitid(P_PIDFD)",
            "5.4",
            "the status of our children",
            waited,
        ),
        Feature::tried("pidfs inode", "6.9", "to tell processes apart", inode),
        Feature::tried(
            "PIDFD_INFO_EXIT",
            "6.15",
            "the status of any other process",
            kept,
        ),
    ];
    Availability {
        backend: Backend::Pidfd,
        features,
        verdict,
        remedies: remedies.into_iter().flatten().collect(),
    }
}

fn newer(since: &str) -> String {
    format!("run Linux {since} or newer")
}

/// What the monitor promises on this kernel.
pub(crate) fn guarantees() -> Guarantees {
    guarantees_if(try_child().is_ok_and(|child| child.is_kept))
}

/// Whether there are pidfds at all.
pub(crate) fn has_pidfds() -> bool {
    open_self().is_ok_and(|process| process.pidfd().is_some())
}

fn guarantees_if(kept_by_the_kernel: bool) -> Guarantees {
    Guarantees {
        survives: if kept_by_the_kernel {
            Survives::WithDescriptors
        } else {
            Survives::Nothing
        },
        others: if kept_by_the_kernel {
            Exactness::UnlessThreadsRace
        } else {
            Exactness::UntilReaped
        },
        exact_time: false,
    }
}

fn open_self() -> Result<Process, OpenError> {
    Process::open(i32::try_from(std::process::id()).unwrap_or(0))
}

/// What was learned of a child that ended at once.
struct Child {
    /// It could be waited for by its pidfd.
    by_pidfd: bool,
    /// The kernel knows its status after it was reaped.
    is_kept: bool,
}

/// Reaps a child, then asks the kernel what it remembers of it.
fn try_child() -> io::Result<Child> {
    let pid = sys::fork_and_exit(CODE)?;
    let process = Process::open(pid).map_err(io::Error::other)?;
    while !process.has_ended()? {
        std::thread::yield_now();
    }
    let expected = i32::from(CODE) << 8;
    let by_pidfd = match process.pidfd() {
        Some(pidfd) => sys::wait(Target::Pidfd(pidfd), Zombie::Reaped)
            .ok()
            .flatten(),
        None => None,
    };
    let status = match by_pidfd {
        None => status::reap(&process)?,
        known => known,
    };
    if status != Some(expected) {
        let text = format!("a child that ended with {CODE} showed {status:?}");
        return Err(io::Error::other(text));
    }
    let kept = match process.pidfd() {
        Some(pidfd) => sys::exit_info(pidfd)?,
        None => None,
    };
    Ok(Child {
        by_pidfd: by_pidfd.is_some(),
        is_kept: kept == Some(expected),
    })
}

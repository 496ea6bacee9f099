//! [`Child`]: a process that makes namespaces which no thread of the daemon can: in a user
//! namespace, or with a pid namespace and its init process. Owns that nothing of it is left when
//! the daemon dies, until the daemon lets it go on.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe2};

use super::plan::{Plan, Step};
use super::sys::{self, Ends};
use crate::sys::wait_unseen;

/// How long a child may take from one report to the next, in milliseconds.
const LIMIT: u16 = 5_000;

/// What failed, in words.
fn step(number: i32) -> &'static str {
    const NAMES: [(Step, &str); 6] = [
        (Step::Mounts, "cannot enter the empty file system"),
        (Step::Users, "cannot enter the user namespace"),
        (Step::Network, "cannot enter the network namespace"),
        (Step::Unshare, "cannot make namespaces"),
        (Step::Fork, "cannot fork the pod's init process"),
        (Step::Execute, "cannot execute the pod's init process"),
    ];
    let mut names = NAMES.iter();
    let found = names.find(|(step, _)| *step as i32 == number);
    found.map_or("failed", |(_, name)| name)
}

/// A process that has made its namespaces and waits. Dropped, it ends, and so does its child.
#[derive(Debug)]
pub(in crate::sandbox) struct Child {
    first: libc::pid_t,
    pid: i32,
    report: File,
    gate: Option<File>,
}

impl Child {
    /// Starts it, and returns when it has done what the plan says. Blocks.
    pub(in crate::sandbox) fn start(plan: &Plan<'_>) -> io::Result<Self> {
        let (report, to_report) = pipe2(OFlag::O_CLOEXEC)?;
        let (to_pass, gate) = pipe2(OFlag::O_CLOEXEC)?;
        let ends = Ends {
            report: to_report.as_fd(),
            gate: to_pass.as_fd(),
            others: [report.as_raw_fd(), gate.as_raw_fd()],
        };
        let first = sys::start(plan, &ends)?;
        drop((to_report, to_pass));
        let mut child = Self {
            first,
            pid: first,
            report: report.into(),
            gate: Some(gate.into()),
        };
        match child.read()? {
            Some((0, 0)) => {}
            Some((0, pid)) => child.pid = pid,
            Some((failed, errno)) => return Err(error(failed, errno)),
            None => return Err(io::Error::other("it died before it had its namespaces")),
        }
        Ok(child)
    }

    /// The process that is in the namespaces.
    pub(in crate::sandbox) fn pid(&self) -> i32 {
        self.pid
    }

    /// Lets it go on: an init becomes its program, any other ends. Blocks until then.
    pub(in crate::sandbox) fn release(mut self) -> io::Result<()> {
        if let Some(mut gate) = self.gate.take() {
            // A word for each of the two.
            gate.write_all(&[1, 1])?;
        }
        match self.read()? {
            Some((failed, errno)) => Err(error(failed, errno)),
            // Closed by the program's execution.
            None => Ok(()),
        }
    }

    /// What it reports next; `None` at the end. Not without end: any other child that is about to
    /// execute a program has the other end as well, until it does.
    fn read(&mut self) -> io::Result<Option<(i32, i32)>> {
        let mut polled = [PollFd::new(self.report.as_fd(), PollFlags::POLLIN)];
        let is_late = loop {
            match poll(&mut polled, LIMIT) {
                Err(Errno::EINTR) => {}
                ready => break ready? == 0,
            }
        };
        if is_late {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut words = [[0; 4]; 2];
        match self.report.read_exact(words.as_flattened_mut()) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            read => {
                read?;
                let [first, second] = words.map(i32::from_ne_bytes);
                Ok(Some((first, second)))
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.gate.take().is_some() {
            // It was not let go. Our own child, not reaped yet: the number is no other process's.
            let _ = kill(Pid::from_raw(self.first), Signal::SIGKILL);
        }
        // It fails for one that was waited for already, and nothing can have.
        let _ = wait_unseen(self.first);
    }
}

fn error(failed: i32, errno: i32) -> io::Error {
    let source = io::Error::from_raw_os_error(errno);
    io::Error::new(source.kind(), format!("{}: {source}", step(failed)))
}

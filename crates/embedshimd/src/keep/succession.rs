//! [`Succession`]: the daemon becomes the keeper, by `execve`, when its own keeper has ended. So
//! its children, and the zombies that show how they ended, are children of the new keeper. Owns
//! that everything that can fail is done before the daemon stops to serve.

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::ops::DerefMut;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command};

use anyhow::Context;
use nix::fcntl::Flock;
use nix::sched::{CloneFlags, unshare};
use tracing::error;

use super::fd_table::FdTable;
use super::handover;
use super::inbox::{self, Inbox};
use super::program::{self, Program};
use super::zombies::Zombies;
use crate::cli::Serve;
use crate::state_dir::lock;

/// Everything that the new keeper needs, but for the stored descriptors.
#[derive(Debug)]
pub(crate) struct Succession {
    program: Program,
    format: handover::Format,
    lock: Flock<File>,
    inbox: Inbox,
}

impl Succession {
    /// Takes the keeper's lock and socket. `spawn` starts a child that nothing else waits for.
    /// Blocks on the state directory and on a run of this program.
    pub(crate) fn prepare<C: DerefMut<Target = Child>>(
        options: &Serve,
        spawn: impl Fn(&mut Command) -> io::Result<C>,
    ) -> anyhow::Result<Self> {
        let program = Program::of_daemon(options).context("cannot find our own program")?;
        let format = program::check(program.path(), spawn, || {})?;
        let state_dir = &options.locations.state_dir;
        let lock = lock::take(state_dir, &lock::keeper_path(state_dir))?
            .context("another keeper has taken the state directory")?;
        let path = inbox::path(state_dir);
        let inbox =
            Inbox::open(&path).with_context(|| format!("cannot listen on {}", path.display()))?;
        Ok(Self {
            program,
            format,
            lock,
            inbox,
        })
    }

    /// Becomes the keeper of these descriptors; returns only if that fails.
    pub(crate) fn become_keeper(
        self,
        descriptors: impl IntoIterator<Item = (String, OwnedFd)>,
    ) -> anyhow::Result<Infallible> {
        let mut fds = FdTable::default();
        for (name, descriptor) in descriptors {
            if let Err(full) = fds.insert(&name, descriptor, u64::MAX) {
                error!(name, "cannot store a descriptor: {full}; it is lost");
            }
        }
        // Other threads may start programs until this one executes its own. With a table of its own
        // it alone has the descriptors inheritable.
        unshare(CloneFlags::CLONE_FILES).context("cannot separate its open files")?;
        let ends = (self.inbox.socket.as_fd(), self.lock.as_fd());
        // A daemon has no statuses of processes that it reaped before they were asked for.
        let open = handover::Open::new(self.format, ends, None, &fds, &Zombies::default())?;
        Err(self.program.become_next(open.number()).into())
    }
}

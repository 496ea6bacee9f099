//! [`Files`]: the keeper's lock file and its socket in the state directory. Owns that both are
//! recreated when they were removed with the state directory.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use embedshim_core::chain;
use nix::fcntl::Flock;
use tracing::{error, warn};

use super::inbox::Inbox;
use crate::state_dir::claim::Claim;
use crate::state_dir::lock;

/// The open files of a keeper.
#[derive(Debug)]
pub(super) struct Files {
    state_dir: PathBuf,
    inbox_path: PathBuf,
    lock: Flock<File>,
    inbox: Inbox,
    _claim: Claim,
}

impl Files {
    pub(super) fn new(state_dir: &Path, lock: Flock<File>, claim: Claim, inbox: Inbox) -> Self {
        Self {
            state_dir: state_dir.to_owned(),
            inbox_path: super::inbox::path(state_dir),
            lock,
            inbox,
            _claim: claim,
        }
    }

    pub(super) fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    pub(super) fn inbox_path(&self) -> &Path {
        &self.inbox_path
    }

    /// The descriptors of the socket and of the lock, for the next keeper.
    pub(super) fn descriptors(&self) -> (BorrowedFd<'_>, BorrowedFd<'_>) {
        (self.inbox.socket.as_fd(), self.lock.as_fd())
    }

    /// Writes lines for `embedshimd upgrade` into the lock file.
    pub(super) fn write_status(&self, status: &str) {
        if let Err(error) = lock::write_owner(&self.lock, status) {
            warn!(%error, "cannot write keeper.lock");
        }
    }

    /// Recreates the socket if its path was removed: the next daemon looks for it. A daemon that
    /// runs does not need that: its socket is connected to this one, wherever that was.
    pub(super) fn recreate_inbox(&mut self) {
        if self.inbox_path.symlink_metadata().is_ok() {
            return;
        }
        match Inbox::open(&self.inbox_path) {
            Ok(inbox) => self.inbox = inbox,
            Err(error) => error!(
                %error,
                socket = %self.inbox_path.display(),
                "cannot recreate the keeper's socket"
            ),
        }
    }

    /// Recreates the lock file if it was removed or replaced. True if this keeper has a new lock,
    /// whose status has to be written.
    pub(super) fn recreate_lock(&mut self) -> bool {
        let path = lock::keeper_path(&self.state_dir);
        if lock::is_at(&self.lock, &path) {
            return false;
        }
        match lock::take(&self.state_dir, &path) {
            Ok(Some(lock)) => {
                self.lock = lock;
                return true;
            }
            Ok(None) => error!(
                state_dir = %self.state_dir.display(),
                "cannot recreate the keeper's lock: another keeper has taken the state directory"
            ),
            Err(failure) => {
                let error = chain(failure.as_ref());
                error!(error, "cannot recreate the keeper's lock");
            }
        }
        false
    }
}

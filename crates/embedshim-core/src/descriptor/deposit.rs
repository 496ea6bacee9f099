//! [`Deposit`]: what one process of a task has with the descriptor store. Owns that everything kept for a process is forgotten when it
//! is not needed any more; dropping a deposit forgets nothing, since that is also what the end of a daemon looks like.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use tracing::{debug, warn};

use super::{DescriptorName, DescriptorStore, Inherited, Role};

/// The descriptors of one process that outlive this daemon. Clones are of the same deposit.
#[derive(Clone, Debug)]
pub(crate) struct Deposit {
    store: Arc<dyn DescriptorStore>,
    number: u64,
    /// The roles that something is kept in, as bits.
    roles: Arc<AtomicU8>,
}

impl Deposit {
    /// The deposit of this number, which nobody else has.
    pub(crate) fn new(store: Arc<dyn DescriptorStore>, number: u64) -> Self {
        Self {
            store,
            number,
            roles: Arc::default(),
        }
    }

    /// What the process's record has to hold.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// What a predecessor has left of it, by role. It stays kept.
    pub(crate) fn inherit(&self, inherited: &mut Inherited) -> Vec<(Role, std::os::fd::OwnedFd)> {
        let mut found = Vec::new();
        for role in Role::ALL {
            let descriptors = inherited.take_all(&self.name(role));
            if !descriptors.is_empty() {
                self.roles.fetch_or(bit(role), Ordering::Relaxed);
            }
            found.extend(descriptors.into_iter().map(|descriptor| (role, descriptor)));
        }
        found
    }

    /// Has a duplicate of this descriptor kept. Without it the process goes on all the same, as long as we do.
    pub(crate) fn keep(&self, role: Role, descriptor: &impl AsFd) {
        let name = self.name(role);
        match self.store.keep(&name, descriptor.as_fd()) {
            Ok(()) => drop(self.roles.fetch_or(bit(role), Ordering::Relaxed)),
            Err(error) => {
                warn!(%name, %error, "a descriptor is not kept: it will be lost with this daemon");
            }
        }
    }

    /// What is kept in this role is not needed any more.
    pub(crate) fn forget(&self, role: Role) {
        let before = self.roles.fetch_and(!bit(role), Ordering::Relaxed);
        if before & bit(role) == 0 {
            return;
        }
        let name = self.name(role);
        if let Err(error) = self.store.forget(&name) {
            debug!(%name, %error, "a descriptor that nobody needs is still kept");
        }
    }

    /// Nothing is needed any more.
    pub(crate) fn forget_all(&self) {
        for role in Role::ALL {
            self.forget(role);
        }
    }

    fn name(&self, role: Role) -> DescriptorName {
        DescriptorName::Process(role, self.number)
    }
}

fn bit(role: Role) -> u8 {
    1 << role as u8
}

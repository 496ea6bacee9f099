//! [`Plan`]: what a child of the daemon joins and makes, and what of that can fail.

use std::os::fd::BorrowedFd;

use nix::sched::CloneFlags;

/// What a child does. What it does not join or make is the daemon's.
#[derive(Debug)]
pub(in crate::sandbox) struct Plan<'a> {
    /// The user namespace that it joins.
    pub(in crate::sandbox) users: Option<BorrowedFd<'a>>,
    /// The network namespace that it joins.
    pub(in crate::sandbox) network: Option<BorrowedFd<'a>>,
    /// The namespaces that it makes, `CLONE_NEW*`.
    pub(in crate::sandbox) own: CloneFlags,
    /// It has a child that is the init of the pid namespace.
    pub(in crate::sandbox) init: Option<Init<'a>>,
}

/// The init process of a pod.
#[derive(Debug)]
pub(in crate::sandbox) struct Init<'a> {
    /// The mount namespace that it joins.
    pub(in crate::sandbox) mounts: BorrowedFd<'a>,
    /// Its program.
    pub(in crate::sandbox) program: BorrowedFd<'a>,
    /// The user and group that it becomes.
    pub(in crate::sandbox) ids: (u32, u32),
}

/// A step of a child that can fail.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Mounts = 1,
    Users,
    Network,
    Unshare,
    Fork,
    Execute,
}

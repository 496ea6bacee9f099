//! [`make`]: a user namespace for ids of files and processes. Owns that no process of it is left.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;

use crate::sys::NamespaceHolder;

/// A user namespace with these lines of `/proc/PID/uid_map` and `gid_map`. It lives as long as the
/// descriptor, a mount or a process that uses it.
pub(crate) fn make(users: &str, groups: &str) -> io::Result<OwnedFd> {
    let holder = NamespaceHolder::start()?;
    let of_holder = |file: &str| format!("/proc/{}/{file}", holder.pid());
    fs::write(of_holder("uid_map"), users)?;
    fs::write(of_holder("gid_map"), groups)?;
    File::open(of_holder("ns/user")).map(OwnedFd::from)
}

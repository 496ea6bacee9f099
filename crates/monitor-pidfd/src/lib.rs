//! Exits by pidfd: readiness for every process by one epoll instance, the status by `waitid` for children and by what
//! the kernel still knows for others. Complete on Linux 6.15 and newer while somebody holds the pidfds; before that exact
//! for children only. Other backends build on its readiness.

mod monitor;
mod probe;
mod status;
mod sys;

pub use monitor::PidfdMonitor;
pub use probe::probe;

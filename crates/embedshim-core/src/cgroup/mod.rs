//! Cgroups of containers: which processes are in them, what they use, and whether the kernel killed for memory.

/// The counters of one cgroup.
#[derive(Clone, Debug, PartialEq)]
pub enum Metrics {}

//! The compiled program, and what it is made for. Owns the names in it; loads nothing.

use std::os::unix::fs::MetadataExt;

use aya::include_bytes_aligned;

/// The CO-RE object of `bpf/exit.bpf.c`, from build.rs.
pub(crate) static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/exit.bpf.o"));
/// The CO-RE object of `bpf/all.bpf.c`.
pub(crate) static ALL_OBJECT: &[u8] =
    include_bytes_aligned!(concat!(env!("OUT_DIR"), "/all.bpf.o"));
/// Copies of one program: the object says why.
pub(crate) const PROGRAMS: [&str; 3] = ["record_exit", "record_exit_2", "record_exit_3"];
/// What the programs attach to.
pub(crate) const TRACEPOINT: &str = "sched_process_exit";
/// `PROC_PID_INIT_INO` of linux/proc_ns.h.
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

/// The inode of this process's pid namespace, or 0 for the initial one, whose pids are the
/// kernel's own.
pub(crate) fn own_pid_namespace() -> u32 {
    let inode =
        std::fs::metadata("/proc/self/ns/pid").map_or(INITIAL_PID_NAMESPACE, |found| found.ino());
    if inode == INITIAL_PID_NAMESPACE {
        0
    } else {
        u32::try_from(inode).unwrap_or(0)
    }
}

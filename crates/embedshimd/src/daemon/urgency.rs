//! [`Urgency`]: how soon the thread that answers every client gets a processor. The runtimes that
//! the daemon calls are in its own cgroup, and dozens of them at once have as much right to the
//! processors as this one thread. Owns the scheduling of that thread; never that of another thread
//! or of a child, which have what the daemon was started with.

use tracing::debug;

use crate::sys::Scheduling;

/// Three times the weight of a thread with the usual nice value. Beside 32 lives at once, the
/// median of State was 5.5 ms with 0, 2.1 with -3, 0.45 with -5 and 0.69 with -10; shorter turns
/// (`sched_runtime`) brought nothing.
const NICE: i32 = -5;
/// New threads and children begin as usual ones (`SCHED_FLAG_RESET_ON_FORK`).
const RESET_ON_FORK: u64 = 1;

/// The thread that made it is scheduled soon until it is dropped.
pub(super) struct Urgency(Option<Scheduling>);

impl Urgency {
    /// Has the calling thread scheduled soon, if the daemon was started as processes usually are,
    /// and may (`CAP_SYS_NICE`). An operator's `Nice=` or `CPUSchedulingPolicy=` stays as it is.
    pub(super) fn begin() -> Self {
        let usual = Scheduling::of_this_thread().and_then(|found| {
            let is_usual = found.policy == libc::SCHED_OTHER.cast_unsigned() && found.nice == 0;
            if !is_usual {
                return Ok(None);
            }
            let mut urgent = found;
            urgent.flags |= RESET_ON_FORK;
            urgent.nice = NICE;
            urgent.give_to_this_thread()?;
            Ok(Some(found))
        });
        Self(usual.unwrap_or_else(|error| {
            debug!(%error, "the daemon is scheduled as any other process");
            None
        }))
    }
}

impl Drop for Urgency {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.map(Scheduling::give_to_this_thread) {
            debug!(%error, "the daemon stays scheduled as one that serves");
        }
    }
}

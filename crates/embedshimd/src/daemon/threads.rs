//! The threads for what blocks, as far as memory is concerned: when the last of them ends, the
//! daemon is idle, and what many containers have needed can go back to the system. Owns their
//! number; starts none.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::sys;

static RUNNING: AtomicUsize = AtomicUsize::new(0);

/// A thread begins.
pub(super) fn begin() {
    RUNNING.fetch_add(1, Ordering::Relaxed);
}

/// A thread ends, because there was no work for it.
pub(super) fn end() {
    if RUNNING.fetch_sub(1, Ordering::Relaxed) == 1 {
        sys::trim_heap();
    }
}

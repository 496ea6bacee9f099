//! Failpoints: the places where a daemon that is killed leaves the most interesting traces, right
//! before and right after each step that lasts. Compiled only with the feature `failpoints`, for
//! tests; without it a step costs nothing.
//!
//! A test asks for the death at the n-th step by a file. The file is removed when it is read, so a
//! successor is not killed again.

/// A step that lasts is about to be done, or was just done.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn step(_: &'static str) {}

#[cfg(feature = "failpoints")]
pub use armed::{arm, step};

#[cfg(feature = "failpoints")]
mod armed {
    use std::path::Path;
    use std::sync::atomic::{AtomicI64, Ordering};

    /// Steps left to live; no end if it is not positive.
    static LEFT: AtomicI64 = AtomicI64::new(0);

    /// Reads and removes `DIRECTORY/failpoint`, which holds a number: at that step this process is
    /// killed.
    pub fn arm(directory: &Path) {
        let file = directory.join("failpoint");
        let steps = std::fs::read_to_string(&file).unwrap_or_default();
        let _ = std::fs::remove_file(&file);
        LEFT.store(steps.trim().parse().unwrap_or(0), Ordering::Relaxed);
    }

    /// A step that lasts is about to be done, or was just done.
    pub fn step(name: &'static str) {
        if LEFT.load(Ordering::Relaxed) > 0 && LEFT.fetch_sub(1, Ordering::Relaxed) == 1 {
            eprintln!("failpoint: {name}");
            // Not a panic nor an exit: no code of this process may run any more.
            let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
        }
    }
}

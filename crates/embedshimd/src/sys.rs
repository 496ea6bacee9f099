//! The one call into the C library that no crate wraps.

/// Gives freed memory back to the system. Starting reads the kernel's type information (5 MB), and glibc would keep that much
/// of its heap for as long as the daemon runs.
#[cfg(target_env = "gnu")]
pub(crate) fn trim_heap() {
    // SAFETY: malloc_trim(3) has no preconditions and may be called from any thread at any time.
    unsafe { libc::malloc_trim(0) };
}

/// Other allocators give memory back by themselves.
#[cfg(not(target_env = "gnu"))]
pub(crate) fn trim_heap() {}

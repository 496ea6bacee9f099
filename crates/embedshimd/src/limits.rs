//! The limit of open files (`RLIMIT_NOFILE`) of this process: raising it, and how much of it is
//! used.

use std::io;
use std::os::unix::fs::MetadataExt;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit to the hard limit, and returns that.
pub(crate) fn raise_open_files() -> io::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

/// The soft limit as it is; 0 if it cannot be read.
pub(crate) fn max_open_files() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft)
}

/// How many files this process has open, counted as seldom as it can be: before Linux 6.2 a count
/// looks at each of them, so one for each thing that is stored would be quadratic work.
#[derive(Debug)]
pub(crate) struct OpenFiles {
    count: fn() -> Option<Count>,
    last: Option<Count>,
    /// The most files that were opened since the last count.
    since: u64,
}

/// How many files a process has open, and how many it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) open: u64,
    pub(crate) limit: u64,
}

/// A question is asked for each thing that is stored, and fewer files are opened for each.
const OPENED_BETWEEN_QUESTIONS: u64 = 32;

impl Default for OpenFiles {
    fn default() -> Self {
        Self {
            count: count_open_files,
            last: None,
            since: 0,
        }
    }
}

impl OpenFiles {
    /// Counts by this function.
    #[cfg(test)]
    pub(crate) fn counted_by(count: fn() -> Option<Count>) -> Self {
        Self {
            count,
            ..Self::default()
        }
    }

    /// The count if `more` files beside those that are open exceed a bound, which is a function of
    /// the limit. `None` if they do not, or if nothing can be counted.
    pub(crate) fn exceeding(&mut self, more: u64, bound: impl Fn(u64) -> u64) -> Option<Count> {
        let exceeds = |count: Count, since| count.open + since + more > bound(count.limit);
        self.since += more + OPENED_BETWEEN_QUESTIONS;
        if let Some(last) = self.last
            && !exceeds(last, self.since)
        {
            return None;
        }
        self.last = (self.count)();
        self.since = 0;
        self.last.filter(|&now| exceeds(now, 0))
    }
}

/// How many files this process has open now.
pub(crate) fn count_open_files() -> Option<Count> {
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    // Linux 6.2 and newer give the number as the size of the directory.
    let open = match std::fs::metadata("/proc/self/fd").ok()?.size() {
        0 => std::fs::read_dir("/proc/self/fd").ok()?.count() as u64,
        open => open,
    };
    Some(Count { open, limit })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn a_bound_is_exact_and_counted_for_seldom() {
        static OPEN: AtomicU64 = AtomicU64::new(100);
        static COUNTS: AtomicU64 = AtomicU64::new(0);
        let mut files = OpenFiles::counted_by(|| {
            COUNTS.fetch_add(1, Ordering::Relaxed);
            Some(Count {
                open: OPEN.load(Ordering::Relaxed),
                limit: 100_000,
            })
        });
        // As many as one container, or more, for each question.
        while files.exceeding(2, |limit| limit / 2).is_none() {
            OPEN.fetch_add(10, Ordering::Relaxed);
        }
        let open = OPEN.load(Ordering::Relaxed);
        assert!((49_998..=50_010).contains(&open), "{open}");
        let counts = COUNTS.load(Ordering::Relaxed);
        assert!(counts < 50, "{counts} counts for {} questions", open / 10);
        // What was closed is seen.
        OPEN.store(100, Ordering::Relaxed);
        assert_eq!(files.exceeding(2, |limit| limit / 2), None);
        let last = files.exceeding(60_000, |limit| limit / 2);
        assert_eq!(last.map(|count| count.open), Some(100));
    }

    #[test]
    fn the_kernel_counts_what_is_open() {
        let before = count_open_files().unwrap();
        let more: Vec<_> = (0..200).map(|_| io::pipe().unwrap()).collect();
        // Other tests of this process open and close some.
        let after = count_open_files().unwrap();
        assert!(after.open > before.open + 300, "{before:?} {after:?}");
        assert_eq!(after.limit, max_open_files());
        drop(more);
    }
}

//! [`Subject`]: a monitor under test, and [`Place`], where successive monitors of one test leave
//! what they keep. Owns what the suite has to know of a monitor beside its guarantees.

use std::error::Error;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use exit_monitor::{ExitMonitor, ExitRecord};
use tempfile::TempDir;

/// More than any check takes on an emulated machine.
const LIMIT: Duration = Duration::from_mins(2);
/// As many processes as a check watches at once, and more: enough for every check but those about
/// a full table.
pub const CAPACITY: u32 = 8192;

/// A kind of monitor under test.
pub trait Subject: Send + Sync + 'static {
    /// Its name, the first part of the names of its tests.
    fn name(&self) -> &str;

    /// Opens a monitor, within a tokio runtime that has I/O and time.
    ///
    /// `state` is a directory, empty at first: a monitor whose records outlive it finds by this
    /// directory what its predecessor left. `capacity` is the number of processes that must fit
    /// into its table, if it has one.
    fn open(
        &self,
        state: &Path,
        capacity: u32,
    ) -> Result<Arc<dyn ExitMonitor>, Box<dyn Error + Send + Sync>>;

    /// Why it cannot run here, if it cannot.
    fn missing(&self) -> Option<String> {
        None
    }

    /// Whether it refuses a watch beyond its capacity
    /// ([`WatchError::TableFull`](exit_monitor::WatchError::TableFull)).
    fn is_bounded(&self) -> bool {
        false
    }

    /// Whether its records outlive the monitor, and with it the process that has the monitor.
    fn keeps_records(&self) -> bool {
        false
    }

    /// The words in its refusal of a process that a tracer or another monitor of this kind has
    /// already. None: it never refuses one.
    fn refuses_shared(&self) -> Option<&str> {
        None
    }

    /// Removes what its monitors have left outside of `state`.
    fn clean_up(&self, state: &Path) {
        let _ = state;
    }
}

/// Where the monitors of one test, one after the other, keep what outlives them; gone with the
/// test.
pub struct Place {
    subject: Arc<dyn Subject>,
    directory: TempDir,
}

impl Place {
    /// An empty one.
    pub fn new(subject: &Arc<dyn Subject>) -> Self {
        let directory = TempDir::with_prefix("exit-conformance-");
        Self {
            subject: Arc::clone(subject),
            directory: directory.expect("a temporary directory"),
        }
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A monitor with what its predecessor in this place has left.
    pub fn open(&self) -> Arc<dyn ExitMonitor> {
        self.open_with(CAPACITY)
    }

    /// A monitor like [`open`](Self::open)'s, into whose table this many processes fit.
    pub fn open_with(&self, capacity: u32) -> Arc<dyn ExitMonitor> {
        let opened = self.subject.open(self.directory(), capacity);
        opened.unwrap_or_else(|error| panic!("{}: {error:?}", self.subject.name()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.subject.clean_up(self.directory.path());
    }
}

/// Runs a check to its end, on this thread.
pub fn block_on(check: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(check);
}

/// The next `count` exits; fails after two minutes without one.
pub async fn next(monitor: &Arc<dyn ExitMonitor>, count: usize) -> Vec<ExitRecord> {
    let mut records = Vec::new();
    while records.len() < count {
        let got = tokio::time::timeout(LIMIT, monitor.next_exits(&mut records)).await;
        got.unwrap_or_else(|_| panic!("{} of {count} exits were reported", records.len()))
            .unwrap();
    }
    records
}

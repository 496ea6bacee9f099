//! [`Ledger`]: what was asked and answered, which codes were due and which were told, what streams
//! brought, and everything that is wrong. Writes a line for each into a file, which is what one
//! reads when a run has failed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A client that waits longer for an answer does not get one.
pub(crate) const DEADLINE: Duration = Duration::from_mins(1);

/// What has happened so far, in numbers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) lives: u64,
    pub(crate) execs: u64,
    pub(crate) requests: u64,
    /// Codes that were compared with the one that was due.
    pub(crate) codes: u64,
    /// Outputs that brought each number once and in order.
    pub(crate) streams: u64,
    /// What they brought.
    pub(crate) bytes: u64,
    /// What a daemon that died has appended to log files once more.
    pub(crate) repeated: u64,
    /// By kind.
    pub(crate) kills: BTreeMap<&'static str, u64>,
    pub(crate) steps: u64,
    /// Requests that were refused because their runtime was killed, and asked again.
    pub(crate) refused: u64,
    /// Checkpoints that a container went on from, or was to.
    pub(crate) checkpoints: u64,
    pub(crate) pods: u64,
    pub(crate) longest: Duration,
    pub(crate) longest_of: String,
    pub(crate) failures: Vec<String>,
}

/// A container, and which of its execs.
pub(crate) type Process = (String, Option<String>);

#[derive(Debug)]
struct Pages {
    counts: Counts,
    ends: BTreeMap<Process, Vec<u32>>,
    interrupted: BTreeSet<String>,
    /// How many calls of the runtime were killed for each process.
    runtimes: BTreeMap<Process, u64>,
    file: BufWriter<File>,
}

/// The book of one run.
#[derive(Debug)]
pub(crate) struct Ledger {
    pages: Mutex<Pages>,
    began: Instant,
}

impl Ledger {
    /// An empty one; its lines go to `path`.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            pages: Mutex::new(Pages {
                counts: Counts::default(),
                ends: BTreeMap::new(),
                interrupted: BTreeSet::new(),
                runtimes: BTreeMap::new(),
                file: BufWriter::new(File::create(path)?),
            }),
            began: Instant::now(),
        })
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn line(&self, pages: &mut Pages, text: &str) {
        let at = self.began.elapsed();
        // Flushed each: what a run that hangs has done last is what counts.
        let _ = writeln!(pages.file, "{:9.3} {text}", at.as_secs_f64());
        let _ = pages.file.flush();
    }

    /// Something happened that explains what follows.
    pub(crate) fn note(&self, text: &str) {
        self.line(&mut self.pages(), text);
    }

    /// A request was answered.
    pub(crate) fn answered(&self, what: &str, answer: &str, took: Duration) {
        let mut pages = self.pages();
        self.line(&mut pages, &format!("{what}: {answer}"));
        let counts = &mut pages.counts;
        counts.requests += 1;
        if took > counts.longest {
            counts.longest = took;
            what.clone_into(&mut counts.longest_of);
        }
    }

    /// A code was told for a process that had to end with one of these.
    pub(crate) fn code(&self, process: &str, source: &str, told: u32, due: &[u32]) {
        self.pages().counts.codes += 1;
        if !due.contains(&told) {
            self.failure(&format!(
                "{process}: {source} tells code {told}, due is {due:?}"
            ));
        }
    }

    /// A stream has brought what was due, some of it twice if it goes to a log file.
    pub(crate) fn stream(&self, name: &str, bytes: usize, repeated: usize) {
        let mut pages = self.pages();
        self.line(
            &mut pages,
            &format!("{name}: {bytes} bytes, {repeated} twice"),
        );
        let counts = &mut pages.counts;
        counts.streams += 1;
        counts.bytes += bytes as u64;
        counts.repeated += repeated as u64;
    }

    /// A process has ended with this code, of which an event must tell. One that was restored from
    /// a checkpoint ends twice.
    pub(crate) fn ended(&self, container: &str, exec: Option<String>, code: u32) {
        let process = (container.to_owned(), exec);
        self.pages().ends.entry(process).or_default().push(code);
    }

    /// A call of the runtime for this process is about to be killed.
    pub(crate) fn runtime_killed(&self, operation: &str, process: &Process) {
        let mut pages = self.pages();
        let (container, exec) = process;
        let exec = exec.as_deref().unwrap_or_default();
        self.line(
            &mut pages,
            &format!("{container} {exec}: killing its runtime's {operation}"),
        );
        *pages.runtimes.entry(process.clone()).or_default() += 1;
    }

    /// How many calls of the runtime were killed for this process.
    pub(crate) fn runtimes_killed(&self, process: &Process) -> u64 {
        self.pages().runtimes.get(process).copied().unwrap_or(0)
    }

    /// The same for a container and all its execs.
    pub(crate) fn all_runtimes_killed(&self, container: &str) -> u64 {
        let pages = self.pages();
        let its = pages.runtimes.iter().filter(|((id, _), _)| id == container);
        its.map(|(_, count)| count).sum()
    }

    /// containerd went away while it was doing something for this container.
    pub(crate) fn interrupted(&self, container: &str) {
        self.pages().interrupted.insert(container.to_owned());
    }

    /// Those for which it did.
    pub(crate) fn all_interrupted(&self) -> BTreeSet<String> {
        self.pages().interrupted.clone()
    }

    /// All that have ended.
    pub(crate) fn ends(&self) -> BTreeMap<Process, Vec<u32>> {
        self.pages().ends.clone()
    }

    /// Something is wrong.
    pub(crate) fn failure(&self, text: &str) {
        let mut pages = self.pages();
        self.line(&mut pages, &format!("FAILURE {text}"));
        eprintln!("FAILURE {text}");
        pages.counts.failures.push(text.to_owned());
    }

    /// Changes the counts.
    pub(crate) fn count(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.pages().counts);
    }

    /// A signal was sent to what serves.
    pub(crate) fn kill(&self, kind: &'static str) {
        let mut pages = self.pages();
        self.line(&mut pages, kind);
        *pages.counts.kills.entry(kind).or_default() += 1;
    }

    /// The numbers.
    pub(crate) fn counts(&self) -> Counts {
        self.pages().counts.clone()
    }

    /// Whether anything is wrong.
    pub(crate) fn has_failures(&self) -> bool {
        !self.pages().counts.failures.is_empty()
    }
}

//! What the BPF program records, against the verdict of `waitpid` in the process's own parent.
//! Needs root, BPF and a bpffs on /sys/fs/bpf (`cargo xtask setup` mounts it): without them these tests fail.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that cannot go on has failed"
)]

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use embedshim_core::clock::BootTime;
use embedshim_core::exit::{
    Adopted, Backend, Evidence, ExitMonitor, ExitRecord, ExitStatus, Guarantees, UnknownReason,
    WatchError, Watched,
};
use embedshim_core::process::{Process, ProcessIdentity};
use monitor_bpf::{BpfConfig, BpfMonitor};
use monitor_pidfd::PidfdMonitor;

const LIMIT: Duration = Duration::from_secs(20);

/// Every shape of `shapes.c`, with the signal its parent sends once it has begun to end, if any.
const SHAPES: [(&[&str], Option<i32>); 23] = [
    (&["exit", "0"], None),
    (&["exit", "7"], None),
    (&["exit", "255"], None),
    (&["raise", "15"], None),
    (&["raise", "9"], None),
    (&["raise", "34"], None),
    (&["abort"], None),
    (&["group-exit-by-thread"], None),
    (&["leader-first"], None),
    (&["leader-first-others-return"], None),
    (&["leader-exits-5-others-live"], None),
    (&["thread-exec"], None),
    (&["leader-gone-thread-exec"], None),
    (&["leader-gone-then-signal"], Some(libc::SIGKILL)),
    (&["leader-gone-then-signal"], Some(libc::SIGTERM)),
    (&["thread-aborts"], None),
    (&["64-threads"], None),
    (&["all-at-once"], None),
    (&["vfork-child"], None),
    (&["ignored-term-exec"], None),
    (&["stopped-and-continued"], None),
    (&["handled-term"], None),
    (&["now-not"], Some(libc::SIGKILL)),
];

/// Tells that a process is dead, but never how: whatever is known then is the BPF program's.
#[derive(Debug)]
struct Ignorant(PidfdMonitor);

impl Ignorant {
    fn ignore(mut record: ExitRecord) -> ExitRecord {
        record.status = ExitStatus::Unknown {
            reason: UnknownReason::NotOurChild,
        };
        record.evidence = Evidence::None;
        record
    }
}

#[async_trait]
impl ExitMonitor for Ignorant {
    fn backend(&self) -> Backend {
        self.0.backend()
    }
    fn guarantees(&self) -> Guarantees {
        self.0.guarantees()
    }
    async fn watch(&self, process: Arc<Process>) -> Result<Watched, WatchError> {
        Ok(match self.0.watch(process).await? {
            Watched::Ended(record) => Watched::Ended(Self::ignore(record)),
            armed @ Watched::Armed => armed,
        })
    }
    async fn adopt(&self, known: &[ProcessIdentity]) -> Result<Vec<Adopted>, WatchError> {
        let adopted = self.0.adopt(known).await?.into_iter();
        Ok(adopted
            .map(|found| match found {
                Adopted::Ended(record) => Adopted::Ended(Self::ignore(record)),
                armed @ Adopted::Armed(_) => armed,
            })
            .collect())
    }
    async fn next_exits(&self, into: &mut Vec<ExitRecord>) -> Result<(), WatchError> {
        let before = into.len();
        self.0.next_exits(into).await?;
        for record in into.iter_mut().skip(before) {
            *record = Self::ignore(*record);
        }
        Ok(())
    }
    async fn confirm(&self, process: ProcessIdentity) -> Result<(), WatchError> {
        self.0.confirm(process).await
    }
    async fn unwatch(&self, process: ProcessIdentity) -> Result<(), WatchError> {
        self.0.unwatch(process).await
    }
}

/// A pin directory of this test's own, removed whatever happens.
struct Pins(PathBuf);

impl Pins {
    fn new(test: &str) -> Self {
        let name = format!("/test/{}/{test}", std::process::id());
        Self(monitor_bpf::pin_dir_for(Path::new(&name)))
    }

    fn open(&self, capacity: u32) -> BpfMonitor {
        let config = BpfConfig {
            pin_dir: self.0.clone(),
            capacity,
        };
        let readiness = Arc::new(Ignorant(PidfdMonitor::new().unwrap()));
        BpfMonitor::open(&config, readiness).unwrap_or_else(|error| panic!("{}", text(&error)))
    }
}

fn text(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(
        || error.to_string(),
        |source| format!("{error}: {}", text(source)),
    )
}

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
        let _ = self.0.parent().map(std::fs::remove_dir);
    }
}

/// The helper program, compiled once.
fn shapes() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let program = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("shapes-{}", std::process::id()));
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/shapes.c");
        let compiled = Command::new("cc")
            .args(["-O1", "-pthread", "-static", source, "-o"])
            .arg(&program)
            .status();
        assert!(compiled.expect("a C compiler is needed").success());
        program
    })
}

/// A process that waits to be let go.
struct Subject {
    child: Child,
    process: Arc<Process>,
}

impl Subject {
    fn new(shape: &[&str]) -> Self {
        let child = Command::new(shapes())
            .args(shape)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let process = Arc::new(Process::open(i32::try_from(child.id()).unwrap()).unwrap());
        Self { child, process }
    }

    fn identity(&self) -> ProcessIdentity {
        self.process.identity()
    }

    /// Lets it end, and gives its parent's verdict.
    fn end(&mut self, signal: Option<i32>) -> ExitStatus {
        self.child.stdin.take().unwrap().write_all(b"x").unwrap();
        if let Some(signal) = signal {
            self.process.signal(signal).unwrap();
        }
        let status = self.child.wait().unwrap();
        ExitStatus::from_wait_status(status.into_raw())
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn next(monitor: &BpfMonitor, count: usize) -> Vec<ExitRecord> {
    let mut records = Vec::new();
    while records.len() < count {
        let got = tokio::time::timeout(LIMIT, monitor.next_exits(&mut records)).await;
        got.unwrap_or_else(|_| panic!("{} of {count} exits were told", records.len()))
            .unwrap();
    }
    records
}

#[tokio::test]
async fn every_shape_of_an_exit_is_recorded_as_waitpid_sees_it() {
    let pins = Pins::new("shapes");
    let monitor = pins.open(64);
    for round in 0..3 {
        for (shape, signal) in SHAPES {
            let mut subject = Subject::new(shape);
            assert_eq!(
                monitor.watch(Arc::clone(&subject.process)).await.unwrap(),
                Watched::Armed
            );
            let before = BootTime::now();
            let verdict = subject.end(signal);
            let after = BootTime::now();
            let record = next(&monitor, 1).await.remove(0);
            assert_eq!(
                (record.process, record.status),
                (subject.identity(), verdict),
                "{shape:?}, round {round}"
            );
            assert_eq!(record.evidence, Evidence::Bpf);
            assert!(
                before <= record.at && record.at <= after,
                "{shape:?}: not the time of the exit"
            );
            monitor.confirm(record.process).await.unwrap();
        }
    }
}

#[tokio::test]
async fn an_exit_while_nobody_runs_is_known_to_the_next() {
    let pins = Pins::new("successor");
    let monitor = pins.open(64);
    let mut dead = Subject::new(&["exit", "9"]);
    let mut living = Subject::new(&["exit", "3"]);
    for subject in [&dead, &living] {
        monitor.watch(Arc::clone(&subject.process)).await.unwrap();
    }
    drop(monitor);
    let before = BootTime::now();
    dead.end(None);
    let after = BootTime::now();
    let monitor = pins.open(64);
    let adopted = monitor
        .adopt(&[dead.identity(), living.identity()])
        .await
        .unwrap();
    let [Adopted::Ended(record), Adopted::Armed(_)] = &adopted[..] else {
        panic!("{adopted:?}")
    };
    assert_eq!(record.status, ExitStatus::Exited(9));
    assert!(before <= record.at && record.at <= after);
    // Not confirmed: the next one is told again.
    drop(monitor);
    let monitor = pins.open(64);
    let again = monitor
        .adopt(&[dead.identity(), living.identity()])
        .await
        .unwrap();
    assert!(matches!(&again[0], Adopted::Ended(record) if record.status == ExitStatus::Exited(9)));
    monitor.confirm(dead.identity()).await.unwrap();
    assert_eq!(living.end(None), ExitStatus::Exited(3));
    assert_eq!(next(&monitor, 1).await[0].status, ExitStatus::Exited(3));
    drop(monitor);
    let forgotten = pins.open(64).adopt(&[dead.identity()]).await.unwrap();
    assert!(
        matches!(&forgotten[0], Adopted::Ended(record) if !record.status.is_known()),
        "{forgotten:?}"
    );
}

#[tokio::test]
async fn a_number_with_another_start_time_is_another_process() {
    let pins = Pins::new("reuse");
    let monitor = pins.open(64);
    let mut subject = Subject::new(&["exit", "5"]);
    let mut imposter = subject.identity();
    imposter.start_ticks += 1;
    // What would be left of a process whose number was free again.
    monitor.adopt(&[imposter]).await.unwrap();
    subject.end(None);
    let adopted = monitor.adopt(&[imposter]).await.unwrap();
    assert!(
        matches!(&adopted[0], Adopted::Ended(record) if !record.status.is_known()),
        "{adopted:?}"
    );
}

#[tokio::test]
async fn a_full_table_refuses_in_words_and_keeps_working() {
    let pins = Pins::new("full");
    let monitor = pins.open(2);
    let mut subjects = [0, 1, 2].map(|_| Subject::new(&["exit", "1"]));
    for subject in &subjects[..2] {
        monitor.watch(Arc::clone(&subject.process)).await.unwrap();
        monitor.watch(Arc::clone(&subject.process)).await.unwrap();
    }
    let refused = monitor
        .watch(Arc::clone(&subjects[2].process))
        .await
        .unwrap_err();
    assert!(
        matches!(refused, WatchError::TableFull { capacity: 2 }),
        "{refused}"
    );
    monitor.unwatch(subjects[0].identity()).await.unwrap();
    monitor
        .watch(Arc::clone(&subjects[2].process))
        .await
        .unwrap();
    for subject in &mut subjects {
        subject.end(None);
    }
    let told: Vec<_> = next(&monitor, 2)
        .await
        .iter()
        .map(|record| record.process)
        .collect();
    assert!(told.contains(&subjects[1].identity()) && told.contains(&subjects[2].identity()));
}

#[tokio::test]
async fn hundreds_of_simultaneous_exits_are_all_told_once() {
    let pins = Pins::new("crowd");
    let monitor = pins.open(1024);
    let mut subjects: Vec<_> = (0..300)
        .map(|n| (n, Subject::new(&["exit", &(n % 256).to_string()])))
        .collect();
    for (_, subject) in &subjects {
        monitor.watch(Arc::clone(&subject.process)).await.unwrap();
    }
    for (_, subject) in &mut subjects {
        subject.child.stdin.take().unwrap().write_all(b"x").unwrap();
    }
    let records = next(&monitor, 300).await;
    assert_eq!(records.len(), 300);
    for (n, subject) in &subjects {
        let record = records
            .iter()
            .find(|record| record.process == subject.identity())
            .unwrap();
        assert_eq!(record.status.code(), n % 256);
    }
}

#[tokio::test]
async fn a_process_that_is_over_before_it_is_watched_is_told_at_once() {
    let pins = Pins::new("late");
    let monitor = pins.open(64);
    let mut subject = Subject::new(&["exit", "6"]);
    subject.child.stdin.take().unwrap().write_all(b"x").unwrap();
    while !subject.process.has_ended().unwrap() {
        tokio::task::yield_now().await;
    }
    let Watched::Ended(record) = monitor.watch(Arc::clone(&subject.process)).await.unwrap() else {
        panic!("armed for a dead process");
    };
    // It ended before it was tracked, and this readiness never knows: so nobody does, and nobody guesses.
    assert!(!record.status.is_known());
}

#[tokio::test]
async fn two_daemons_do_not_see_each_others_processes() {
    let (one, other) = (Pins::new("one"), Pins::new("other"));
    let (first, second) = (one.open(16), other.open(16));
    let mut subject = Subject::new(&["exit", "8"]);
    first.watch(Arc::clone(&subject.process)).await.unwrap();
    second.adopt(&[]).await.unwrap();
    subject.end(None);
    assert_eq!(next(&first, 1).await[0].status, ExitStatus::Exited(8));
}

#[tokio::test]
async fn without_bpffs_the_error_says_how_to_mount_it() {
    let dir = tempfile::tempdir().unwrap();
    let config = BpfConfig {
        pin_dir: dir.path().join("v1"),
        capacity: 16,
    };
    let error = BpfMonitor::open(&config, Arc::new(PidfdMonitor::new().unwrap())).unwrap_err();
    assert!(
        error.to_string().contains("mount -t bpf bpf /sys/fs/bpf"),
        "{error}"
    );
    assert!(!config.pin_dir.exists());
}

#[tokio::test]
async fn another_capacity_takes_effect_when_nobody_is_watched() {
    let pins = Pins::new("capacity");
    drop(pins.open(16));
    let monitor = pins.open(32);
    assert_eq!(monitor.capacity(), 32);
    let subject = Subject::new(&["exit", "0"]);
    monitor.watch(Arc::clone(&subject.process)).await.unwrap();
    drop(monitor);
    assert_eq!(
        pins.open(64).capacity(),
        32,
        "a watched process must not be forgotten"
    );
}

//! Whose exit statuses pidfds can tell: children always, others' children while they are zombies
//! and, where the kernel keeps exit information (6.15), after that.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::zombie_processes,
    reason = "a test that cannot go on has failed, and it is the monitor that reaps"
)]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use exit_monitor::process::Process;
use exit_monitor::{Adopted, Evidence, Exactness, ExitMonitor, ExitRecord, ExitStatus, Watched};
use monitor_pidfd::PidfdMonitor;

const LIMIT: Duration = Duration::from_secs(20);

async fn next(monitor: &PidfdMonitor, count: usize) -> Vec<ExitRecord> {
    let mut records = Vec::new();
    while records.len() < count {
        tokio::time::timeout(LIMIT, monitor.next_exits(&mut records))
            .await
            .expect("no exit was reported")
            .unwrap();
    }
    records
}

fn open(pid: u32) -> Arc<Process> {
    Arc::new(Process::open(i32::try_from(pid).unwrap()).unwrap())
}

fn sleeper() -> Child {
    Command::new("sleep").arg("1000").spawn().unwrap()
}

/// A shell whose child waits for a line and exits with 42; the shell reaps it when it is told to,
/// not before.
struct Foreign {
    parent: Child,
    child: Arc<Process>,
}

impl Foreign {
    fn new() -> Self {
        let script = "exec 3<&0; (read line <&3; exit 42) & echo $!; exec 0</dev/null; \
                      while ! [ -e \"$1\" ]; do sleep 0.01; done; wait";
        let never_or_later =
            std::env::temp_dir().join(format!("embedshim-reap-{}", std::process::id()));
        let mut parent = Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(never_or_later)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(parent.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        Self {
            parent,
            child: open(line.trim().parse().unwrap()),
        }
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.parent.kill();
        let _ = self.parent.wait();
    }
}

#[tokio::test]
async fn a_child_has_an_exact_status_and_is_reaped_when_that_is_confirmed() {
    let monitor = PidfdMonitor::new().unwrap();
    for signal in [libc::SIGKILL, libc::SIGTERM, libc::SIGRTMIN() + 3] {
        let child = sleeper();
        let process = open(child.id());
        assert_eq!(
            monitor.watch(Arc::clone(&process)).await.unwrap(),
            Watched::Armed
        );
        process.signal(signal).unwrap();
        let record = next(&monitor, 1).await.remove(0);
        let signal = u8::try_from(signal).unwrap();
        assert_eq!(
            record.status,
            ExitStatus::Signaled {
                signal,
                core_dumped: false
            }
        );
        assert_eq!(record.evidence, Evidence::Wait);
        assert!(
            process.signal(0).is_ok(),
            "its status is lost with this process if it is not written down"
        );
        monitor.confirm(record.process).await.unwrap();
        assert!(process.signal(0).is_err(), "it was not reaped");
    }
}

#[tokio::test]
async fn a_zombie_of_another_parent_shows_its_status() {
    let monitor = PidfdMonitor::new().unwrap();
    let mut foreign = Foreign::new();
    monitor.watch(Arc::clone(&foreign.child)).await.unwrap();
    foreign
        .parent
        .stdin
        .take()
        .unwrap()
        .write_all(b"go\n")
        .unwrap();
    let record = next(&monitor, 1).await.remove(0);
    assert_eq!(record.status, ExitStatus::Exited(42));
    assert!(
        matches!(record.evidence, Evidence::Zombie | Evidence::PidfdInfo),
        "{record:?}"
    );
}

#[tokio::test]
async fn a_reaped_process_of_another_parent_is_known_where_the_kernel_keeps_it() {
    let monitor = PidfdMonitor::new().unwrap();
    let mut foreign = Foreign::new();
    foreign
        .parent
        .stdin
        .take()
        .unwrap()
        .write_all(b"go\n")
        .unwrap();
    while !foreign.child.has_ended().unwrap() {
        tokio::task::yield_now().await;
    }
    // Its parent goes, and the system's init reaps the zombie.
    foreign.parent.kill().unwrap();
    foreign.parent.wait().unwrap();
    let reaped = async {
        while foreign.child.signal(0).is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, reaped)
        .await
        .expect("no process reaps orphans here");
    let Watched::Ended(record) = monitor.watch(Arc::clone(&foreign.child)).await.unwrap() else {
        panic!("armed for a dead process");
    };
    if monitor.guarantees().others >= Exactness::UnlessThreadsRace {
        assert_eq!(
            (record.status, record.evidence),
            (ExitStatus::Exited(42), Evidence::PidfdInfo)
        );
    } else {
        assert!(!record.status.is_known());
    }
}

#[tokio::test]
async fn a_watch_twice_is_one_and_an_unwatched_process_is_never_reported() {
    let monitor = PidfdMonitor::new().unwrap();
    let mut children = [sleeper(), sleeper()];
    let [watched, unwatched] = [open(children[0].id()), open(children[1].id())];
    for process in [&watched, &watched, &unwatched] {
        assert_eq!(
            monitor.watch(Arc::clone(process)).await.unwrap(),
            Watched::Armed
        );
    }
    monitor.unwatch(unwatched.identity()).await.unwrap();
    monitor.unwatch(unwatched.identity()).await.unwrap();
    for child in &mut children {
        child.kill().unwrap();
    }
    let told = next(&monitor, 1).await;
    assert_eq!(
        told.iter().map(|record| record.process).collect::<Vec<_>>(),
        [watched.identity()]
    );
    children[1].wait().unwrap();
    let silence = tokio::time::timeout(
        Duration::from_millis(50),
        monitor.next_exits(&mut Vec::new()),
    )
    .await;
    assert!(silence.is_err(), "an exit was reported twice or unasked");
}

#[tokio::test]
async fn a_process_that_is_gone_when_adopted_is_unknown_and_not_invented() {
    let monitor = PidfdMonitor::new().unwrap();
    let mut child = sleeper();
    let gone = open(child.id()).identity();
    child.kill().unwrap();
    child.wait().unwrap();
    let mut living = sleeper();
    let adopted = monitor
        .adopt(vec![gone.into(), open(living.id()).identity().into()])
        .await
        .unwrap();
    let [Adopted::Ended(record), Adopted::Armed(_)] = &adopted[..] else {
        panic!("{adopted:?}")
    };
    assert_eq!(
        (record.status.is_known(), record.evidence),
        (false, Evidence::None)
    );
    living.kill().unwrap();
    assert_eq!(next(&monitor, 1).await[0].status.code(), 137);
}

#[test]
fn probing_finds_what_is_here_and_leaves_no_child() {
    let found = monitor_pidfd::probe();
    assert!(found.verdict.is_ok(), "{found:?}");
    assert!(
        found
            .features
            .iter()
            .any(|feature| feature.name == "pidfd_open" && feature.is_present())
    );
}

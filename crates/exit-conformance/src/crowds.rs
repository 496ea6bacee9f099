//! Many processes at once: each end is reported once, and processes that are not watched cost
//! nothing.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::Arc;

use exit_monitor::{ExitMonitor, ExitStatus, WatchError, Watched};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::check::{Check, checks};
use crate::family::{Family, check_status, program};
use crate::subject::{Place, Subject, next};

pub(crate) fn checks() -> Vec<Check> {
    let all = checks!(|_| true;
        thousands_of_ends_at_once_are_each_reported_once,
        all_threads_that_end_at_once_are_one_end,
        strangers_do_not_disturb,
        descriptors_of_others_are_not_kept_open,
    );
    let full =
        checks!(|subject| subject.is_bounded(); a_full_table_refuses_in_words_and_keeps_working);
    all.into_iter().chain(full).collect()
}

/// On an emulated machine a tenth is enough.
fn scaled(count: usize) -> usize {
    if std::env::var_os("EXIT_CONFORMANCE_SLOW").is_some() {
        count / 10
    } else {
        count
    }
}

async fn watch_all(monitor: &Arc<dyn ExitMonitor>, family: &Family) {
    for member in &family.members {
        let armed = monitor.watch(Arc::clone(member)).await.unwrap();
        assert_eq!(armed, Watched::Armed);
    }
}

/// Lets all go, and compares what is reported with what their parent says.
async fn end_all(monitor: &Arc<dyn ExitMonitor>, family: &mut Family) {
    family.let_go();
    let count = family.members.len();
    let mut told = HashMap::new();
    for record in next(monitor, count).await {
        let again = told.insert(record.process, record);
        assert_eq!(again, None, "reported twice");
        monitor.confirm(record.process).await.unwrap();
    }
    let verdicts = family.verdicts();
    for (member, verdict) in family.members.iter().zip(verdicts) {
        let record = &told[&member.identity()];
        check_status(record, verdict, monitor.guarantees(), &family.shape);
    }
}

async fn thousands_of_ends_at_once_are_each_reported_once(subject: &Arc<dyn Subject>) {
    let place = Place::new(subject);
    let monitor = place.open();
    let mut family = Family::new("parent", scaled(5000), &["exit", "#"]);
    watch_all(&monitor, &family).await;
    end_all(&monitor, &mut family).await;
}

/// Two of the last threads can be at the tracepoint at the same time (below Linux 6.16); the status
/// must be that of the last one.
async fn all_threads_that_end_at_once_are_one_end(subject: &Arc<dyn Subject>) {
    let place = Place::new(subject);
    let monitor = place.open();
    for _ in 0..scaled(40) {
        let mut family = Family::new("parent", 50, &["all-at-once"]);
        watch_all(&monitor, &family).await;
        end_all(&monitor, &mut family).await;
    }
}

/// Thousands of processes a second that are not watched come and go meanwhile.
async fn strangers_do_not_disturb(subject: &Arc<dyn Subject>) {
    let place = Place::new(subject);
    let monitor = place.open();
    let mut storm = Command::new(program())
        .args(["storm", "600"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut rounds = 0;
    while storm.try_wait().unwrap().is_none() {
        let mut family = Family::new("parent", 4, &["exit", "#"]);
        watch_all(&monitor, &family).await;
        end_all(&monitor, &mut family).await;
        rounds += 1;
    }
    assert!(rounds > 0, "the storm was over at once");
}

async fn a_full_table_refuses_in_words_and_keeps_working(subject: &Arc<dyn Subject>) {
    let place = Place::new(subject);
    let monitor = place.open_with(2);
    let mut family = Family::new("parent", 3, &["exit", "1"]);
    for member in &family.members[..2] {
        monitor.watch(Arc::clone(member)).await.unwrap();
        // Again is not another one.
        monitor.watch(Arc::clone(member)).await.unwrap();
    }
    let refused = monitor.watch(Arc::clone(&family.members[2])).await;
    let refused = refused.unwrap_err();
    assert!(
        matches!(refused, WatchError::TableFull { capacity: 2 }),
        "{refused}"
    );
    monitor.unwatch(family.identity()).await.unwrap();
    monitor.watch(Arc::clone(&family.members[2])).await.unwrap();
    family.let_go();
    let told: Vec<_> = next(&monitor, 2).await;
    assert!(
        told.iter()
            .all(|record| record.process != family.identity())
    );
    assert!(
        told.iter()
            .all(|record| record.status == ExitStatus::Exited(1))
    );
    family.verdicts();
}

/// A monitor may start processes for itself; none of them may hold the pipe that another part of
/// this program has just closed.
async fn descriptors_of_others_are_not_kept_open(subject: &Arc<dyn Subject>) {
    let (reader, writer) = std::io::pipe().unwrap();
    let place = Place::new(subject);
    let monitor = place.open();
    drop(writer);
    let mut state = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    // Others of these tests may be between fork and exec just now, for a moment.
    let moment = PollTimeout::from(2000_u16);
    let ended = poll(&mut state, moment).unwrap();
    assert_eq!(ended, 1, "another process holds the pipe's other end");
    drop(monitor);
}

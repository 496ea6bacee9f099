//! Numbers are used again: a process is never taken for another.

use std::sync::Arc;
use std::time::Duration;

use exit_monitor::{Adopted, Exactness, ExitStatus, Watched};

use crate::check::{Check, checks};
use crate::family::Family;
use crate::subject::{Place, Subject, next};

pub(crate) fn checks() -> [Check; 4] {
    checks!(|_| true;
        a_number_that_is_used_again_is_another_process,
        a_number_with_another_start_time_is_another_process,
        of_two_processes_with_one_number_the_living_one_is_taken_over,
        an_unwatched_process_is_never_reported,
    )
}

/// The kernel gives the same pid out again at once (`clone3` with `set_tid`); both ends are
/// reported, each with its own status.
async fn a_number_that_is_used_again_is_another_process(subject: &Arc<dyn Subject>) {
    let place = Place::new(subject);
    let monitor = place.open();
    let mut family = Family::of_one(&["exit", "3"]);
    let first = Arc::clone(family.first());
    monitor.watch(Arc::clone(&first)).await.unwrap();
    // A start time has a hundredth of a second.
    tokio::time::sleep(Duration::from_millis(20)).await;
    let verdict = family.end(None);
    let Some(second) = family.reuse(4) else {
        return;
    };
    assert_eq!(first.identity().pid, second.identity().pid);
    assert_ne!(first.identity(), second.identity());
    // Not confirmed: the first one's record must not become the second's.
    let armed = monitor.watch(Arc::clone(&second)).await.unwrap();
    assert_eq!(armed, Watched::Armed);
    let record = next(&monitor, 1).await.remove(0);
    verdict.check(&record, monitor.guarantees(), "the first");
    family.let_go();
    let record = next(&monitor, 1).await.remove(0);
    assert_eq!(record.process, second.identity());
    if monitor.guarantees().others == Exactness::Always || record.status.is_known() {
        assert_eq!(record.status, ExitStatus::Exited(4));
    }
    monitor.confirm(first.identity()).await.unwrap();
    monitor.confirm(second.identity()).await.unwrap();
}

async fn a_number_with_another_start_time_is_another_process(subject: &Arc<dyn Subject>) {
    let place = Place::new(subject);
    let monitor = place.open();
    let mut family = Family::of_one(&["exit", "5"]);
    // What would be left of a process whose number was free again.
    let mut imposter = family.identity();
    imposter.start_ticks += 1;
    for _ in 0..2 {
        let adopted = monitor.adopt(vec![imposter.into()]).await.unwrap();
        assert!(
            matches!(&adopted[0], Adopted::Ended(record) if !record.status.is_known()),
            "{adopted:?}"
        );
        family.let_go();
        while !family.first().has_ended().unwrap() {
            tokio::task::yield_now().await;
        }
    }
}

/// A successor finds two processes of one number in its records; in which order is not said.
async fn of_two_processes_with_one_number_the_living_one_is_taken_over(subject: &Arc<dyn Subject>) {
    for is_dead_first in [true, false] {
        let place = Place::new(subject);
        let mut family = Family::of_one(&["leader-first"]);
        let living = family.identity();
        let monitor = place.open();
        monitor.watch(Arc::clone(family.first())).await.unwrap();
        drop(monitor);
        let mut dead = living;
        dead.start_ticks -= 1;
        let mut known = vec![living.into(), dead.into()];
        if is_dead_first {
            known.reverse();
        }
        let monitor = place.open();
        let adopted = monitor.adopt(known).await.unwrap();
        let is_armed = |found: &Adopted| matches!(found, Adopted::Armed(_));
        let armed: Vec<bool> = adopted.iter().map(is_armed).collect();
        assert_eq!(armed, [!is_dead_first, is_dead_first], "{adopted:?}");
        monitor.confirm(dead).await.unwrap();
        let verdict = family.end(None);
        let record = next(&monitor, 1).await.remove(0);
        assert_eq!(record.process, living);
        verdict.check(&record, monitor.guarantees(), "the living one");
        assert!(
            monitor.guarantees().others != Exactness::Always || record.status.is_known(),
            "{record:?}"
        );
    }
}

async fn an_unwatched_process_is_never_reported(subject: &Arc<dyn Subject>) {
    let place = Place::new(subject);
    let monitor = place.open();
    let mut family = Family::new("parent", 2, &["exit", "2"]);
    let [watched, unwatched] = [0, 1].map(|number: usize| family.members[number].identity());
    for member in &family.members {
        monitor.watch(Arc::clone(member)).await.unwrap();
    }
    monitor.unwatch(unwatched).await.unwrap();
    monitor.unwatch(unwatched).await.unwrap();
    family.let_go();
    // It goes on undisturbed, and its parent is told of its end.
    assert_eq!(family.verdicts(), [ExitStatus::Exited(2); 2]);
    let told = next(&monitor, 1).await;
    assert_eq!(told[0].process, watched);
    let mut more = Vec::new();
    let silence = monitor.next_exits(&mut more);
    let silence = tokio::time::timeout(Duration::from_millis(50), silence).await;
    assert!(silence.is_err() && more.is_empty(), "{more:?}");
}

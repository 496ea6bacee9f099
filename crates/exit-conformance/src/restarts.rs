//! The monitor is dropped and a successor takes over: what a monitor promises of that, it keeps.

use std::sync::Arc;

use exit_monitor::{Adopted, ExitStatus, Known, Survives};

use crate::check::{Check, checks};
use crate::family::Family;
use crate::subject::{Place, Subject, next};

pub(crate) fn checks() -> Vec<Check> {
    let all = checks!(|_| true;
        an_exit_while_nobody_runs_is_known_if_that_is_promised,
        a_watch_is_taken_over_before_the_exit,
    );
    let pinned = checks!(|subject| subject.keeps_records();
        an_exit_that_is_not_confirmed_is_reported_again,
        two_daemons_do_not_see_each_others_processes,
    );
    all.into_iter().chain(pinned).collect()
}

async fn an_exit_while_nobody_runs_is_known_if_that_is_promised(subject: &Arc<dyn Subject>) {
    for keep_pidfd in [true, false] {
        let place = Place::new(subject);
        let monitor = place.open();
        let mut dead = Family::of_one(&["leader-first"]);
        let mut living = Family::of_one(&["exit", "3"]);
        for family in [&dead, &living] {
            monitor.watch(Arc::clone(family.first())).await.unwrap();
        }
        drop(monitor);
        let verdict = dead.end(None);
        let monitor = place.open();
        let pidfd = dead
            .first()
            .pidfd()
            .filter(|_| keep_pidfd)
            .map(|pidfd| pidfd.try_clone_to_owned().unwrap());
        let is_kept = pidfd.is_some();
        let known = vec![
            Known {
                identity: dead.identity(),
                pidfd,
            },
            living.identity().into(),
        ];
        let adopted = monitor.adopt(known).await.unwrap();
        let [Adopted::Ended(record), Adopted::Armed(_)] = &adopted[..] else {
            panic!("{adopted:?}")
        };
        let is_promised = match monitor.guarantees().survives {
            Survives::Everything => true,
            Survives::WithDescriptors => is_kept,
            Survives::Nothing => false,
        };
        if is_promised || record.status.is_known() {
            verdict.check(record, monitor.guarantees(), "while no monitor ran");
        }
        assert!(!is_promised || record.status.is_known(), "{record:?}");
        let verdict = living.end(None);
        let record = next(&monitor, 1).await.remove(0);
        verdict.check(&record, monitor.guarantees(), "afterwards");
    }
}

async fn a_watch_is_taken_over_before_the_exit(subject: &Arc<dyn Subject>) {
    let place = Place::new(subject);
    let mut family = Family::of_one(&["thread-exec"]);
    let mut monitor = place.open();
    monitor.watch(Arc::clone(family.first())).await.unwrap();
    for _ in 0..5 {
        drop(monitor);
        monitor = place.open();
        let adopted = monitor.adopt(vec![family.identity().into()]).await.unwrap();
        assert!(matches!(&adopted[0], Adopted::Armed(_)), "{adopted:?}");
    }
    let verdict = family.end(None);
    let record = next(&monitor, 1).await.remove(0);
    verdict.check(&record, monitor.guarantees(), "taken over");
}

async fn an_exit_that_is_not_confirmed_is_reported_again(subject: &Arc<dyn Subject>) {
    let place = Place::new(subject);
    let mut family = Family::of_one(&["exit", "9"]);
    let monitor = place.open();
    monitor.watch(Arc::clone(family.first())).await.unwrap();
    let verdict = family.end(None);
    for _ in 0..3 {
        let monitor = place.open();
        let adopted = monitor.adopt(vec![family.identity().into()]).await.unwrap();
        let Adopted::Ended(record) = &adopted[0] else {
            panic!("{adopted:?}")
        };
        verdict.check(record, monitor.guarantees(), "not confirmed");
    }
    let monitor = place.open();
    monitor.adopt(vec![family.identity().into()]).await.unwrap();
    monitor.confirm(family.identity()).await.unwrap();
    drop(monitor);
    let monitor = place.open();
    let adopted = monitor.adopt(vec![family.identity().into()]).await.unwrap();
    assert!(
        matches!(&adopted[0], Adopted::Ended(record) if !record.status.is_known()),
        "{adopted:?}"
    );
}

async fn two_daemons_do_not_see_each_others_processes(subject: &Arc<dyn Subject>) {
    let (one, other) = (Place::new(subject), Place::new(subject));
    let (first, second) = (one.open(), other.open());
    let mut family = Family::of_one(&["exit", "8"]);
    first.watch(Arc::clone(family.first())).await.unwrap();
    second.adopt(Vec::new()).await.unwrap();
    family.let_go();
    assert_eq!(next(&first, 1).await[0].status, ExitStatus::Exited(8));
}

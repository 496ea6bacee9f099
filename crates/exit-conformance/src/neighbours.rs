//! Several monitors in one process, of one kind and of all kinds: each reports its own processes,
//! and the end of one monitor is not the end of another.

use std::sync::Arc;

use exit_monitor::{ExitMonitor, WatchError, Watched};

use crate::check::{Check, checks};
use crate::family::Family;
use crate::subject::{Place, Subject, next};

pub(crate) fn checks() -> [Check; 2] {
    checks!(|_| true;
        monitors_in_one_process_tell_their_own_each,
        a_process_of_two_monitors_is_reported_to_both_or_refused,
    )
}

/// Watches one process; the rest of a family of one is watched by no monitor.
async fn watch(monitor: &Arc<dyn ExitMonitor>, family: &Family) -> Result<Watched, WatchError> {
    monitor.watch(Arc::clone(family.first())).await
}

async fn monitors_in_one_process_tell_their_own_each(subject: &Arc<dyn Subject>) {
    let places = [(); 3].map(|()| Place::new(subject));
    let mut monitors: Vec<_> = places.iter().map(Place::open).collect();
    let mut families: Vec<_> = ["3", "4", "5"]
        .map(|code| Family::of_one(&["exit", code]))
        .into();
    for (monitor, family) in monitors.iter().zip(&families) {
        assert_eq!(watch(monitor, family).await.unwrap(), Watched::Armed);
    }
    // The one that goes takes its own watch with it, and no other.
    drop(monitors.remove(0));
    families.remove(0);
    let verdicts: Vec<_> = families.iter_mut().map(|family| family.end(None)).collect();
    for (monitor, verdict) in monitors.iter().zip(&verdicts) {
        let records = next(monitor, 1).await;
        assert_eq!(records.len(), 1, "{records:?}");
        verdict.check(&records[0], monitor.guarantees(), "its own");
        monitor.confirm(records[0].process).await.unwrap();
    }
    // One that comes later finds nothing changed by the others.
    let late = places[0].open();
    let mut family = Family::of_one(&["exit", "6"]);
    watch(&late, &family).await.unwrap();
    let verdict = family.end(None);
    verdict.check(&next(&late, 1).await[0], late.guarantees(), "late");
}

async fn a_process_of_two_monitors_is_reported_to_both_or_refused(subject: &Arc<dyn Subject>) {
    let places = [Place::new(subject), Place::new(subject)];
    let [first, second] = places.each_ref().map(Place::open);
    let mut family = Family::of_one(&["leader-first"]);
    watch(&first, &family).await.unwrap();
    let refused = watch(&second, &family).await;
    let verdict = family.end(None);
    let record = next(&first, 1).await.remove(0);
    verdict.check(&record, first.guarantees(), "the first");
    if let Some(words) = subject.refuses_shared() {
        let text = refused.unwrap_err().to_string();
        assert!(text.contains(words), "{text}");
        return;
    }
    assert_eq!(refused.unwrap(), Watched::Armed);
    // The first one has done with it; the second has not.
    first.confirm(record.process).await.unwrap();
    let record = next(&second, 1).await.remove(0);
    verdict.check(&record, second.guarantees(), "the second");
}

/// Every monitor that can run here watches the same process.
pub(crate) async fn all_backends_in_one_process_agree(subjects: &[Arc<dyn Subject>]) {
    let all: Vec<_> = subjects
        .iter()
        .filter(|subject| subject.missing().is_none())
        .map(|subject| {
            let place = Place::new(subject);
            let monitor = place.open();
            (subject.name(), place, monitor)
        })
        .collect();
    for shape in [["exit", "7"], ["raise", "15"], ["leader-first", "0"]] {
        let mut family = Family::of_one(&shape);
        for (name, _, monitor) in &all {
            let armed = watch(monitor, &family).await.unwrap();
            assert_eq!(armed, Watched::Armed, "{name}");
        }
        let verdict = family.end(None);
        for (name, _, monitor) in &all {
            let record = next(monitor, 1).await.remove(0);
            verdict.check(&record, monitor.guarantees(), name);
            monitor.confirm(record.process).await.unwrap();
        }
    }
}

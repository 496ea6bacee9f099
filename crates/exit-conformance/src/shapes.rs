//! How a process can end, and that each is known exactly.

use std::sync::Arc;

use exit_monitor::process::Process;
use exit_monitor::{ExitStatus, Watched};

use crate::check::{Check, checks};
use crate::family::{Family, check_status, program};
use crate::subject::{Place, Subject, next};

/// Every shape of `shapes.c`, with the signal its parent sends once it has begun to end, if any.
const SHAPES: [(&[&str], Option<i32>); 25] = [
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
    (&["leader-gone-then-signal"], Some(9)),
    (&["leader-gone-then-signal"], Some(15)),
    (&["thread-aborts"], None),
    (&["64-threads"], None),
    (&["all-at-once"], None),
    (&["vfork-child"], None),
    (&["ignored-term-exec"], None),
    (&["stopped-and-continued"], None),
    (&["handled-term"], None),
    (&["exec-chain"], None),
    (&["waits"], Some(9)),
    (&["waits"], Some(34)),
];
/// Shapes for the first process of a pid namespace, which no signal of its own ends.
const OF_INITS: [(&[&str], Option<i32>); 14] = [
    (&["exit", "7"], None),
    (&["leader-first"], None),
    (&["thread-exec"], None),
    (&["leader-gone-thread-exec"], None),
    (&["all-at-once"], None),
    (&["waits"], Some(9)),
    (&["reboot", "restart"], None),
    (&["reboot", "restart2"], None),
    (&["reboot", "halt"], None),
    (&["reboot", "power-off"], None),
    (&["reboot-beside-threads", "halt"], None),
    (&["thread-reboots", "restart"], None),
    (&["leader-gone-thread-reboots", "power-off"], None),
    (&["child-reboots", "restart"], None),
];
const ROUNDS: usize = 3;

pub(crate) fn checks() -> [Check; 6] {
    checks!(|_| true;
        every_shape_of_an_exit_is_what_the_parent_sees,
        a_process_in_a_pid_namespace_of_its_own_is_known_by_our_number,
        a_zombie_in_or_out_of_a_pid_namespace_shows_what_its_parent_will_see,
        an_exit_before_or_during_the_watch_is_reported_once,
        our_own_children_are_exact_and_reaped,
        a_process_that_is_traced_by_another_is_right_or_refused,
    )
}

async fn play(subject: &Arc<dyn Subject>, role: &str, shapes: &[(&[&str], Option<i32>)]) {
    let place = Place::new(subject);
    let monitor = place.open();
    for round in 0..ROUNDS {
        for (shape, signal) in shapes {
            let mut family = Family::new(role, 1, shape);
            let armed = monitor.watch(Arc::clone(family.first())).await.unwrap();
            assert_eq!(armed, Watched::Armed);
            let verdict = family.end(*signal);
            let record = next(&monitor, 1).await.remove(0);
            let what = format!("{role} {shape:?}, round {round}");
            verdict.check(&record, monitor.guarantees(), &what);
            monitor.confirm(record.process).await.unwrap();
        }
    }
}

async fn every_shape_of_an_exit_is_what_the_parent_sees(subject: &Arc<dyn Subject>) {
    play(subject, "parent", &SHAPES).await;
}

async fn a_process_in_a_pid_namespace_of_its_own_is_known_by_our_number(
    subject: &Arc<dyn Subject>,
) {
    play(subject, "nested", &OF_INITS).await;
}

/// As long as the parent has not waited, the status is there to be known.
async fn a_zombie_in_or_out_of_a_pid_namespace_shows_what_its_parent_will_see(
    subject: &Arc<dyn Subject>,
) {
    let place = Place::new(subject);
    let monitor = place.open();
    let roles = [("parent", SHAPES.as_slice()), ("nested", &OF_INITS)];
    for (role, shapes) in roles {
        for (shape, signal) in shapes {
            let mut family = Family::new(role, 1, shape);
            monitor.watch(Arc::clone(family.first())).await.unwrap();
            family.let_go();
            if let Some(signal) = signal {
                family.signal(*signal);
            }
            let record = next(&monitor, 1).await.remove(0);
            let verdict = family.verdicts()[0];
            check_status(&record, verdict, monitor.guarantees(), shape[0]);
            assert!(record.status.is_known(), "{role} {shape:?}: {record:?}");
            monitor.confirm(record.process).await.unwrap();
        }
    }
}

/// The end comes at any moment around the watch: the watch itself reports it, or `next_exits` does
/// afterwards; exactly one of them does.
async fn an_exit_before_or_during_the_watch_is_reported_once(subject: &Arc<dyn Subject>) {
    let place = Place::new(subject);
    let monitor = place.open();
    for round in 0..150 {
        let mut family = Family::of_one(&["exit", "6"]);
        let process = Arc::clone(family.first());
        family.let_go();
        for _ in 0..(round % 30) * 20 {
            std::hint::spin_loop();
        }
        if round % 10 == 0 {
            while !process.has_ended().unwrap() {
                tokio::task::yield_now().await;
            }
        }
        let record = match monitor.watch(Arc::clone(&process)).await.unwrap() {
            Watched::Ended(record) => record,
            Watched::Armed => next(&monitor, 1).await.remove(0),
        };
        assert_eq!(record.process, process.identity());
        // It may have ended before it was looked at; what is known must be right.
        if record.status.is_known() {
            assert_eq!(record.status, ExitStatus::Exited(6));
        }
        assert_eq!(family.verdicts(), [ExitStatus::Exited(6)]);
        monitor.confirm(record.process).await.unwrap();
        assert!(
            reported_nothing_more(&monitor).await,
            "round {round}: reported twice"
        );
    }
}

async fn reported_nothing_more(monitor: &Arc<dyn exit_monitor::ExitMonitor>) -> bool {
    let mut records = Vec::new();
    let more = monitor.next_exits(&mut records);
    let more = tokio::time::timeout(std::time::Duration::from_millis(2), more).await;
    more.is_err() && records.is_empty()
}

/// Whatever the kernel: a child's status is exact, and nothing else has to reap it.
async fn our_own_children_are_exact_and_reaped(subject: &Arc<dyn Subject>) {
    let place = Place::new(subject);
    let monitor = place.open();
    for signal in [9, 15, 34] {
        #[expect(clippy::zombie_processes, reason = "it is the monitor that reaps")]
        let child = std::process::Command::new(program())
            .arg("waits")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let process = Arc::new(Process::open(i32::try_from(child.id()).unwrap()).unwrap());
        monitor.watch(Arc::clone(&process)).await.unwrap();
        process.signal(i32::from(signal)).unwrap();
        let record = next(&monitor, 1).await.remove(0);
        let expected = ExitStatus::Signaled {
            signal,
            core_dumped: false,
        };
        assert_eq!(record.status, expected);
        monitor.confirm(record.process).await.unwrap();
        assert!(process.signal(0).is_err(), "it was not reaped");
    }
}

async fn a_process_that_is_traced_by_another_is_right_or_refused(subject: &Arc<dyn Subject>) {
    let place = Place::new(subject);
    let monitor = place.open();
    let mut family = Family::of_one(&["handled-term"]);
    let mut tracer = std::process::Command::new(program())
        .args(["trace", &family.identity().pid.to_string()])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let output = tracer.stdout.take().unwrap();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line).unwrap();
    if line.is_empty() && std::env::var_os("EXIT_CONFORMANCE_NO_PTRACE").is_some() {
        assert!(!tracer.wait().unwrap().success());
        return;
    }
    assert!(!line.is_empty(), "it is not traced");
    match monitor.watch(Arc::clone(family.first())).await {
        Ok(_) => {
            let verdict = family.end(None);
            let record = next(&monitor, 1).await.remove(0);
            verdict.check(&record, monitor.guarantees(), "traced");
        }
        Err(refused) => {
            let text = refused.to_string();
            let words = subject.refuses_shared();
            let is_excused = words.is_some_and(|words| text.contains(words));
            assert!(is_excused, "{text}");
            assert_eq!(family.end(None).status, ExitStatus::Exited(20));
        }
    }
    assert!(tracer.wait().unwrap().success());
}

//! What needs an operator's attention, by a [`Status`]. Owns the thresholds; pure.

use super::documents::{Manager, Phase, Status};

/// An event that waits longer has a containerd that is down, or does not take it.
const OLD_EVENT: f64 = 60.0;
/// A call of the OCI runtime that takes longer hangs, mostly.
const LONG_CALL: f64 = 60.0;
/// So many daemons that ended by themselves within ten minutes are no accident.
const MANY_FAILURES: usize = 3;

/// A sentence for each thing that needs attention.
pub(super) fn problems(status: &Status) -> Vec<String> {
    let mut problems = Vec::new();
    if status.daemon.phase == Phase::Starting {
        problems.push("the daemon starts: requests wait until it serves".to_owned());
    }
    if status.daemon.reactor_seconds.is_none() {
        problems.push(
            "the reactor does not answer within 1 s: requests and exits wait for it".to_owned(),
        );
    }
    if status.manager == Manager::None {
        problems.push(
            "no service manager stores connections: containerd destroys its containers when this \
             daemon ends; stop containerd before it"
                .to_owned(),
        );
    }
    let failures = status.restarts.recent_failures;
    if failures >= MANY_FAILURES {
        problems.push(format!(
            "{failures} daemons have ended by themselves within 10 minutes; the log says why"
        ));
    }
    for events in &status.events {
        if let Some(age) = events.oldest_seconds.filter(|age| *age > OLD_EVENT) {
            problems.push(format!(
                "{} events wait for the containerd at {}, the oldest for {age:.0} s: it is down, or \
                 will not come back",
                events.waiting, events.address
            ));
        }
    }
    for call in &status.runtime_calls {
        if call.seconds > LONG_CALL {
            problems.push(format!(
                "{} {}: `{}` of the OCI runtime is in flight for {:.0} s: a hook, a mount or the \
                 runtime hangs",
                call.namespace, call.id, call.operation, call.seconds
            ));
        }
    }
    full(status, &mut problems);
    problems
}

/// Tables that are nearly full.
fn full(status: &Status, problems: &mut Vec<String>) {
    let descriptors = status.descriptors;
    let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
    let tables = [
        (
            "the descriptor store",
            Some(count(descriptors.stored)),
            descriptors.store_limit.map(count),
            "FileDescriptorStoreMax= of the unit",
        ),
        (
            "the table of open files",
            descriptors.open,
            Some(descriptors.open_limit),
            "LimitNOFILE= of the unit",
        ),
        (
            "the exit monitor's table",
            status
                .monitor
                .as_ref()
                .map(|monitor| count(monitor.watched)),
            status
                .monitor
                .as_ref()
                .map(|monitor| u64::from(monitor.capacity)),
            "monitor.capacity",
        ),
    ];
    for (name, used, limit, remedy) in tables {
        if let (Some(used), Some(limit)) = (used, limit)
            && used.saturating_mul(10) >= limit.saturating_mul(9)
        {
            problems.push(format!(
                "{name} is nearly full: {used} of {limit}; new containers will be refused: raise \
                 {remedy}"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::documents::{Events, RuntimeCall};
    use super::*;
    use crate::commands::status::tests::healthy;

    #[test]
    fn a_healthy_daemon_has_no_problem_and_each_fault_is_one() {
        assert_eq!(problems(&healthy()), [""; 0]);
        let faults: [fn(&mut Status); 9] = [
            |status| status.daemon.phase = Phase::Starting,
            |status| status.daemon.reactor_seconds = None,
            |status| status.manager = Manager::None,
            |status| status.restarts.recent_failures = 3,
            |status| {
                status.events = vec![Events {
                    address: "/run/containerd/containerd.sock.ttrpc".into(),
                    waiting: 4,
                    bytes: 900,
                    oldest_seconds: Some(61.0),
                    acknowledged: 0,
                    lost: 0,
                }];
            },
            |status| {
                status.runtime_calls = vec![RuntimeCall {
                    namespace: "k8s.io".into(),
                    id: "web".into(),
                    operation: "create".into(),
                    seconds: 200.0,
                }];
            },
            |status| status.descriptors.stored = 9_000,
            |status| status.descriptors.open = Some(950_000),
            |status| {
                status.monitor.as_mut().unwrap().watched = 14_746;
            },
        ];
        let mut all = Vec::new();
        for fault in faults {
            let mut status = healthy();
            fault(&mut status);
            let found = problems(&status);
            assert_eq!(found.len(), 1, "{found:?}");
            all.extend(found);
        }
        insta::assert_snapshot!("problems", all.join("\n"));
    }
}

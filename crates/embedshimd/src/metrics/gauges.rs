//! What is so at the moment of a scrape, by a [`Status`] and by the kernel's counts of this
//! process. Counts nothing.

use std::fs;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::{Registry, Unit};

use crate::admin::documents::{Phase, SandboxStates, States, Status};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ContainerdLabels {
    address: String,
}

type Floats = Gauge<f64, AtomicU64>;

/// Registers the daemon's own, once for each scrape.
pub(super) fn register(registry: &mut Registry, status: &Status) {
    of_daemon(registry, status);
    of_containers(registry, status);
    of_events(registry, status);
    of_limits(registry, status);
}

fn of_daemon(registry: &mut Registry, status: &Status) {
    let serves = status.daemon.phase == Phase::Serving;
    registry.register(
        "serving",
        "1 if the daemon serves, 0 while it starts or leaves",
        ConstGauge::new(u64::from(serves)),
    );
    registry.register(
        "problems",
        "How many things need attention; `embedshimd status` names them",
        ConstGauge::new(count(status.problems.len())),
    );
    registry.register_with_unit(
        "reactor_latency",
        "Time that the reactor took to answer, at most one second",
        Unit::Seconds,
        ConstGauge::new(status.daemon.reactor_seconds.unwrap_or(1.0)),
    );
    registry.register(
        "restarts",
        "Daemons before this one since the state directory was made",
        ConstCounter::new(status.restarts.count),
    );
    registry.register(
        "recent_failures",
        "Daemons that have ended without being asked to within ten minutes",
        ConstGauge::new(count(status.restarts.recent_failures)),
    );
    registry.register(
        "connections",
        "Open connections of containerd and launchers",
        ConstGauge::new(count(status.connections)),
    );
}

fn of_containers(registry: &mut Registry, status: &Status) {
    registry.register("tasks", "Tasks by state", by_state(status.tasks));
    registry.register("execs", "Execs by state", by_state(status.execs));
    registry.register(
        "sandboxes",
        "Pods without a pause container, by state",
        sandboxes_by_state(status.sandboxes.unwrap_or_default()),
    );
    let oldest = status
        .runtime_calls
        .first()
        .map_or(0.0, |call| call.seconds);
    registry.register(
        "runtime_calls_in_flight",
        "Calls of OCI runtimes that are in flight",
        ConstGauge::new(count(status.runtime_calls.len())),
    );
    registry.register_with_unit(
        "runtime_call_oldest",
        "For how long the oldest of them is in flight",
        Unit::Seconds,
        ConstGauge::new(oldest),
    );
    registry.register(
        "blocked_streams",
        "Streams that have bytes, and whose other end has taken none for a second",
        ConstGauge::new(count(status.blocked_streams.len())),
    );
}

fn of_events(registry: &mut Registry, status: &Status) {
    let waiting = Family::<ContainerdLabels, Gauge>::default();
    let oldest = Family::<ContainerdLabels, Floats>::default();
    let acknowledged = Family::<ContainerdLabels, Counter>::default();
    let lost = Family::<ContainerdLabels, Counter>::default();
    for events in &status.events {
        let labels = ContainerdLabels {
            address: events.address.clone(),
        };
        let number = i64::try_from(events.waiting).unwrap_or(i64::MAX);
        waiting.get_or_create(&labels).set(number);
        let age = events.oldest_seconds.unwrap_or(0.0);
        oldest.get_or_create(&labels).set(age);
        acknowledged
            .get_or_create(&labels)
            .inc_by(events.acknowledged);
        lost.get_or_create(&labels).inc_by(events.lost);
    }
    registry.register(
        "events_waiting",
        "Events that containerd has not acknowledged",
        waiting,
    );
    registry.register_with_unit(
        "event_oldest",
        "For how long the oldest of them waits",
        Unit::Seconds,
        oldest,
    );
    registry.register(
        "events_acknowledged",
        "Events that containerd has acknowledged",
        acknowledged,
    );
    registry.register(
        "events_lost",
        "Events that were given up because too many waited",
        lost,
    );
}

fn of_limits(registry: &mut Registry, status: &Status) {
    let descriptors = status.descriptors;
    registry.register(
        "stored_descriptors",
        "Descriptors that the service manager stores",
        ConstGauge::new(count(descriptors.stored)),
    );
    if let Some(limit) = descriptors.store_limit {
        registry.register(
            "stored_descriptors_limit",
            "The most descriptors that it stores",
            ConstGauge::new(count(limit)),
        );
    }
    if let Some(monitor) = &status.monitor {
        registry.register(
            "watched_processes",
            "Processes whose exit is watched",
            ConstGauge::new(count(monitor.watched)),
        );
        registry.register(
            "watched_processes_limit",
            "The most processes that can be watched",
            ConstGauge::new(u64::from(monitor.capacity)),
        );
    }
}

fn by_state(states: States) -> Family<StateLabels, Gauge> {
    family_of([
        ("creating", states.creating),
        ("created", states.created),
        ("running", states.running),
        ("pausing", states.pausing),
        ("paused", states.paused),
        ("stopped", states.stopped),
    ])
}

fn sandboxes_by_state(states: SandboxStates) -> Family<StateLabels, Gauge> {
    family_of([
        ("created", states.created),
        ("ready", states.ready),
        ("stopping", states.stopping),
        ("stopped", states.stopped),
    ])
}

fn family_of<const STATES: usize>(
    all: [(&'static str, u64); STATES],
) -> Family<StateLabels, Gauge> {
    let family = Family::<StateLabels, Gauge>::default();
    for (state, number) in all {
        let number = i64::try_from(number).unwrap_or(i64::MAX);
        family.get_or_create(&StateLabels { state }).set(number);
    }
    family
}

/// Registers what Prometheus's own clients tell of a process, under the same names.
pub(super) fn register_process(registry: &mut Registry, status: &Status) {
    if let Some(open) = status.descriptors.open {
        registry.register("open_fds", "Open files", ConstGauge::new(open));
    }
    registry.register(
        "max_fds",
        "The most files that may be open",
        ConstGauge::new(status.descriptors.open_limit),
    );
    registry.register(
        "threads",
        "Threads",
        ConstGauge::new(count(status.daemon.threads)),
    );
    if let Some(resident) = resident_bytes() {
        registry.register_with_unit(
            "resident_memory",
            "Resident memory",
            Unit::Bytes,
            ConstGauge::new(resident),
        );
    }
    if let Some(seconds) = processor_seconds() {
        registry.register_with_unit(
            "cpu",
            "User and system time",
            Unit::Seconds,
            ConstCounter::new(seconds),
        );
    }
}

fn resident_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split_ascii_whitespace().nth(1)?.parse().ok()?;
    pages.checked_mul(u64::try_from(rustix::param::page_size()).ok()?)
}

fn processor_seconds() -> Option<f64> {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF).ok()?;
    let time = usage.user_time() + usage.system_time();
    #[expect(
        clippy::cast_precision_loss,
        reason = "microseconds are exact for 285 years"
    )]
    let seconds = nix::sys::time::TimeValLike::num_microseconds(&time) as f64 / 1e6;
    Some(seconds)
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

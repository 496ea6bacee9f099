//! What is counted, for Prometheus. Owns the names and labels of all metrics and their text; knows
//! no way by which a scraper comes.

mod gauges;
mod observed;
mod textfile;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use embedshim_core::Observer;
use embedshim_core::exit::{Backend, Evidence, ExitRecord};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

pub(crate) use observed::Observed;
#[cfg(feature = "otel")]
pub(crate) use observed::known_method;
pub(crate) use textfile::textfile;

use crate::admin::documents::Status;
use crate::state_dir::lock::VERSION;

/// The type of the text, of which every Prometheus since 2.5 takes all.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// The beginning of each name.
const PREFIX: &str = "embedshim";
/// Upper bounds in seconds, from an answer out of memory to a hook that takes a minute.
const BUCKETS: [f64; 15] = [
    0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 300.0,
];

/// Everything that is counted while the daemon runs.
pub(crate) struct Metrics {
    registry: Registry,
    backend: Backend,
    exits: Family<ExitLabels, Counter>,
    unknown_exits: Counter,
    runtime_calls: Family<CallLabels, Histogram>,
    requests: Family<MethodLabels, Histogram>,
    refused: Family<MethodLabels, Counter>,
    in_flight: Family<MethodLabels, Gauge>,
    replayed: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ExitLabels {
    backend: &'static str,
    evidence: &'static str,
    process: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    operation: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabels {
    method: &'static str,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// Nothing counted yet, for exits that this backend reports.
    pub(crate) fn new(backend: Backend) -> Arc<Self> {
        let histogram: fn() -> Histogram = || Histogram::new(BUCKETS);
        let mut metrics = Self {
            registry: Registry::with_prefix(PREFIX),
            backend,
            exits: Family::default(),
            unknown_exits: Counter::default(),
            runtime_calls: Family::new_with_constructor(histogram),
            requests: Family::new_with_constructor(histogram),
            refused: Family::default(),
            in_flight: Family::default(),
            replayed: Counter::default(),
        };
        metrics.register();
        Arc::new(metrics)
    }

    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "build",
            "The version of the daemon",
            Info::new([("version", VERSION)]),
        );
        registry.register(
            "exits",
            "Exits of container processes, by the exit monitor, the evidence of the status (none: it \
             is unknown, and reported as 255), and whether it was an init or an exec",
            self.exits.clone(),
        );
        registry.register(
            "unknown_exits",
            "Exits whose status could not be learned, and was reported as 255",
            self.unknown_exits.clone(),
        );
        registry.register_with_unit(
            "runtime_call_duration",
            "Time that calls of OCI runtimes have taken, hooks included",
            Unit::Seconds,
            self.runtime_calls.clone(),
        );
        registry.register_with_unit(
            "request_duration",
            "Time from a request of containerd or a launcher to its answer, but for Wait, which \
             lasts as long as its process",
            Unit::Seconds,
            self.requests.clone(),
        );
        registry.register(
            "requests_refused",
            "Requests that were answered with an error",
            self.refused.clone(),
        );
        registry.register(
            "requests_in_flight",
            "Requests that are not answered yet",
            self.in_flight.clone(),
        );
        registry.register(
            "requests_replayed",
            "Requests that a former daemon has read and not answered",
            self.replayed.clone(),
        );
    }

    /// The text that a scraper reads. `status` has what is not counted, but is so now.
    pub(crate) fn text(&self, status: &Status) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode_registry(&mut text, &self.registry)?;
        let mut now = Registry::with_prefix(PREFIX);
        gauges::register(&mut now, status);
        encode_registry(&mut text, &now)?;
        let mut process = Registry::with_prefix("process");
        gauges::register_process(&mut process, status);
        encode_registry(&mut text, &process)?;
        encode_eof(&mut text)?;
        Ok(text)
    }
}

impl Observer for Metrics {
    fn exited(&self, record: &ExitRecord, is_init: bool) {
        let labels = ExitLabels {
            backend: backend_name(self.backend),
            evidence: evidence_name(record.evidence),
            process: if is_init { "init" } else { "exec" },
        };
        self.exits.get_or_create(&labels).inc();
        if !record.status.is_known() {
            self.unknown_exits.inc();
        }
    }

    fn runtime_called(&self, operation: &'static str, took: Duration, has_succeeded: bool) {
        let labels = CallLabels {
            operation,
            result: if has_succeeded { "ok" } else { "error" },
        };
        let calls = self.runtime_calls.get_or_create(&labels);
        calls.observe(took.as_secs_f64());
    }
}

fn backend_name(backend: Backend) -> &'static str {
    match backend {
        Backend::Bpf => "bpf",
        Backend::Pidfd => "pidfd",
        Backend::Ptrace => "ptrace",
        _ => "other",
    }
}

fn evidence_name(evidence: Evidence) -> &'static str {
    match evidence {
        Evidence::Wait => "wait",
        Evidence::Bpf => "bpf",
        Evidence::Ptrace => "ptrace",
        Evidence::Zombie => "zombie",
        Evidence::PidfdInfo => "pidfd_info",
        _ => "none",
    }
}

#[cfg(test)]
mod tests {
    use embedshim_core::clock::BootTime;
    use embedshim_core::exit::ExitStatus;
    use embedshim_core::process::ProcessIdentity;

    use super::*;
    use crate::commands::status::tests::healthy;

    #[test]
    fn the_text_has_every_metric_with_help_and_ends() {
        let metrics = Metrics::new(Backend::Bpf);
        let record = ExitRecord {
            process: ProcessIdentity {
                pid: 1,
                start_ticks: 1,
                inode: None,
            },
            status: ExitStatus::Exited(7),
            at: BootTime(1),
            evidence: Evidence::Wait,
        };
        metrics.exited(&record, true);
        metrics.exited(&record, true);
        metrics.runtime_called("create", Duration::from_millis(30), true);
        let text = metrics.text(&healthy()).unwrap();
        assert!(text.ends_with("# EOF\n"), "{text}");
        // What differs from run to run, and buckets, whose number is their name.
        let is_stable = |line: &&str| !line.contains("process_") && !line.contains("_bucket{");
        let mut stable: Vec<&str> = text.lines().filter(is_stable).collect();
        // The order of labels is that of a hash map.
        stable.sort_unstable();
        insta::assert_snapshot!("metrics", stable.join("\n"));
    }
}

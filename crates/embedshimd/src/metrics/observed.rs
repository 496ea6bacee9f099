//! [`Observed`]: a handler whose calls are counted and timed. Owns the names of methods, so that a
//! client cannot make labels; answers nothing itself.

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use shim_api::server::{Call, Handler};
use ttrpc::Status;

use super::{MethodLabels, Metrics};

/// The methods that are counted under their names.
const METHODS: [&str; 18] = [
    "Checkpoint",
    "Cleanup",
    "CloseIO",
    "Connect",
    "Create",
    "Delete",
    "Exec",
    "Kill",
    "Pause",
    "Pids",
    "ResizePty",
    "Resume",
    "Shutdown",
    "Start",
    "State",
    "Stats",
    "Update",
    "Wait",
];
/// It lasts as long as its process does.
const WAIT: &str = "Wait";

/// A method by the name that a client has sent, if there is one of this name.
pub(crate) fn known_method(name: &str) -> Option<&'static str> {
    METHODS.into_iter().find(|method| *method == name)
}

/// A handler that is observed.
#[derive(Debug)]
pub(crate) struct Observed<H> {
    handler: H,
    metrics: Arc<Metrics>,
}

impl<H> Observed<H> {
    pub(crate) fn new(handler: H, metrics: Arc<Metrics>) -> Self {
        Self { handler, metrics }
    }
}

/// A call that is not answered yet. Its client may give it up.
struct InFlight<'a> {
    metrics: &'a Metrics,
    labels: MethodLabels,
}

impl<'a> InFlight<'a> {
    fn begin(metrics: &'a Metrics, labels: MethodLabels) -> Self {
        metrics.in_flight.get_or_create(&labels).inc();
        Self { metrics, labels }
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.metrics.in_flight.get_or_create(&self.labels).dec();
    }
}

#[async_trait]
impl<H: Handler> Handler for Observed<H> {
    async fn call(&self, call: Call) -> Result<Vec<u8>, Status> {
        let method = known_method(&call.method).unwrap_or("other");
        let labels = MethodLabels { method };
        if call.is_replay {
            self.metrics.replayed.inc();
        }
        let in_flight = InFlight::begin(&self.metrics, labels.clone());
        let began = Instant::now();
        let answer = self.handler.call(call).await;
        drop(in_flight);
        if method != WAIT {
            let requests = self.metrics.requests.get_or_create(&labels);
            requests.observe(began.elapsed().as_secs_f64());
        }
        if answer.is_err() {
            self.metrics.refused.get_or_create(&labels).inc();
        }
        answer
    }
}

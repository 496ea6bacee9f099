//! [`Exporter`]: what says in the log that a collector does not take spans, not more than once in a
//! while. Owns the words and how often; sends nothing itself.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use tracing::{info, warn};

use super::client::LastError;

/// Between two lines about a collector that does not take spans.
const PAUSE: Duration = Duration::from_mins(1);

/// An exporter whose failures are logged.
#[derive(Debug)]
pub(super) struct Exporter<E> {
    inner: E,
    endpoint: String,
    last_error: LastError,
    is_failing: Arc<AtomicBool>,
    losses: Mutex<Losses>,
}

/// What was lost and is not logged.
#[derive(Debug, Default)]
struct Losses {
    spans: usize,
    logged: Option<Instant>,
}

impl<E> Exporter<E> {
    /// `is_failing` becomes true when spans were not taken, and false when they were.
    pub(super) fn new(
        inner: E,
        endpoint: String,
        last_error: LastError,
        is_failing: Arc<AtomicBool>,
    ) -> Self {
        Self {
            inner,
            endpoint,
            last_error,
            is_failing,
            losses: Mutex::default(),
        }
    }

    /// Notes what became of so many spans, and says it if it is time to.
    fn note(&self, spans: usize, result: &OTelSdkResult) {
        let endpoint = &self.endpoint;
        let was_failing = self.is_failing.swap(result.is_err(), Ordering::Relaxed);
        let mut losses = self.losses.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(()) if was_failing => {
                let lost = std::mem::take(&mut losses.spans);
                info!(endpoint, lost, "traces: the collector takes spans again");
            }
            Ok(()) => {}
            Err(error) => {
                losses.spans = losses.spans.saturating_add(spans);
                let error = self.last_error.take().unwrap_or_else(|| error.to_string());
                if losses.logged.is_none_or(|logged| logged.elapsed() >= PAUSE) {
                    losses.logged = Some(Instant::now());
                    let lost = std::mem::take(&mut losses.spans);
                    warn!(
                        endpoint,
                        lost, error, "traces: the collector does not take spans"
                    );
                }
            }
        }
    }
}

impl<E: SpanExporter> SpanExporter for Exporter<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let result = self.inner.export(batch).await;
        self.note(spans, &result);
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

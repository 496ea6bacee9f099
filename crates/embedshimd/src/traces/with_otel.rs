//! [`Traces`]: the way of spans to a collector, and [`Traced`], a handler whose requests have them.
//! Owns which requests do; the reactor never waits for a collector.
//!
//! The SDK's own thread sends the spans, in batches, and the client below it blocks that thread
//! alone. A task of the runtime would have to share the one thread that serves containerd, and an
//! asynchronous client would be a second HTTP stack. What does not fit into the queue is dropped.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use embedshim_core::observe_calls;
use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};
use shim_api::server::{Call, Handler};
use tracing::{info, warn};
use ttrpc::Status;

use super::client::Client;
use super::exporter::Exporter;
use super::span::{Open, Tracer};
use crate::config::{Config, Telemetry};
use crate::state_dir::lock::VERSION;

/// The longest that a collector may take for one batch.
const EXPORT_LIMIT: Duration = Duration::from_secs(5);
/// The longest that a daemon which leaves waits for a collector: its successor is waited for.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);
const SERVICE: &str = "embedshim";
/// By this the name is the environment's to choose (OpenTelemetry's specification).
const SERVICE_VARIABLE: &str = "OTEL_SERVICE_NAME";

/// The spans of one daemon; none without a collector.
#[derive(Debug)]
pub(crate) struct Traces(Option<Sending>);

#[derive(Debug)]
struct Sending {
    provider: SdkTracerProvider,
    tracer: Tracer,
    is_failing: Arc<AtomicBool>,
}

impl Traces {
    /// Starts the thread that sends spans, if there is a collector to send them to. The file's
    /// settings are valid; what the environment has wrong is logged, and no reason not to serve.
    pub(crate) fn start(config: &Config) -> Self {
        Self(Sending::start(&config.telemetry).unwrap_or_else(|error| {
            let error = format!("{error:#}");
            warn!(error, "traces: no spans are sent");
            None
        }))
    }

    /// The handler, whose requests have spans from now on.
    pub(crate) fn of<H>(&self, handler: H) -> Traced<H> {
        let tracer = self.0.as_ref().map(|sending| sending.tracer.clone());
        Traced { handler, tracer }
    }

    /// Sends what is left, for a bounded time, and not at all to a collector that did not answer.
    /// Blocks.
    pub(crate) fn end(&self) {
        if let Some(sending) = &self.0 {
            let limit = if sending.is_failing.load(Ordering::Relaxed) {
                Duration::ZERO
            } else {
                FLUSH_LIMIT
            };
            // What is not sent by then is lost, and a failure is logged where it is found.
            let _ = sending.provider.shutdown_with_timeout(limit);
        }
    }
}

impl Sending {
    fn start(telemetry: &Telemetry) -> anyhow::Result<Option<Self>> {
        let Some(endpoint) = telemetry.effective_endpoint()? else {
            return Ok(None);
        };
        let client = Client::new(EXPORT_LIMIT);
        let last_error = client.last_error();
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(client)
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(&endpoint)
            .with_timeout(EXPORT_LIMIT)
            .build()?;
        info!(endpoint, "traces: spans are sent to a collector");
        let is_failing = Arc::new(AtomicBool::new(false));
        let exporter = Exporter::new(exporter, endpoint, last_error, Arc::clone(&is_failing));
        let provider = SdkTracerProvider::builder()
            .with_resource(resource())
            .with_sampler(sampler(telemetry))
            .with_batch_exporter(exporter)
            .build();
        let tracer: SdkTracer = provider.tracer(SERVICE);
        Ok(Some(Self {
            provider,
            tracer: Tracer::new(tracer, telemetry.root_ratio > 0.0),
            is_failing,
        }))
    }
}

/// Who sends the spans. The environment can add to it (`OTEL_RESOURCE_ATTRIBUTES`).
fn resource() -> Resource {
    let mut builder = Resource::builder();
    if std::env::var_os(SERVICE_VARIABLE).is_none() {
        builder = builder.with_service_name(SERVICE);
    }
    let host: io::Result<_> = nix::unistd::gethostname().map_err(io::Error::from);
    if let Ok(host) = host {
        let host = host.to_string_lossy().into_owned();
        builder = builder.with_attribute(KeyValue::new("host.name", host));
    }
    builder
        .with_attribute(KeyValue::new("service.version", VERSION))
        .build()
}

/// Who asks decides; of a request without a trace, the configuration.
fn sampler(telemetry: &Telemetry) -> Sampler {
    let roots = Sampler::TraceIdRatioBased(telemetry.root_ratio);
    Sampler::ParentBased(Box::new(roots))
}

/// A handler whose requests have spans.
#[derive(Debug)]
pub(crate) struct Traced<H> {
    handler: H,
    tracer: Option<Tracer>,
}

#[async_trait]
impl<H: Handler> Handler for Traced<H> {
    async fn call(&self, call: Call) -> Result<Vec<u8>, Status> {
        let span = self.tracer.as_ref().and_then(|tracer| tracer.begin(&call));
        let Some(span) = span else {
            return self.handler.call(call).await;
        };
        let open = Open::new(&span);
        let answer = observe_calls(span.clone(), self.handler.call(call)).await;
        open.end(&answer);
        answer
    }
}

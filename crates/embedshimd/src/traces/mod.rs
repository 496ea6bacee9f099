//! Spans of OpenTelemetry, which continue the trace of who asks: one for each request, with those
//! of the runtime's calls below it. In builds with the feature `otel`; in others this is nothing.

#[cfg(feature = "otel")]
mod client;
#[cfg(feature = "otel")]
mod exporter;
#[cfg(feature = "otel")]
mod parent;
#[cfg(feature = "otel")]
mod span;
#[cfg(feature = "otel")]
mod with_otel;
#[cfg(not(feature = "otel"))]
mod without_otel;

#[cfg(feature = "otel")]
pub(crate) use with_otel::{Traced, Traces};
#[cfg(not(feature = "otel"))]
pub(crate) use without_otel::{Traced, Traces};

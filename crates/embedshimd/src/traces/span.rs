//! [`RequestSpan`]: the span of one request, and those of the runtime's calls below it. Owns their
//! names and attributes, which are ids, codes and names of programs: never an argument, a path, an
//! environment or the text of an error.

use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;

use embedshim_core::{CallObserver, EndedCall};
use opentelemetry::trace::{
    Span, SpanBuilder, SpanContext, SpanKind, Status, TraceContextExt, Tracer as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::trace::SdkTracer;
use shim_api::server::Call;
use shim_api::services::Subject;
use ttrpc::Code;

use super::parent;
use crate::metrics::known_method;

/// As containerd's client names it (containerd/otelttrpc).
const STATUS_CODE: &str = "rpc.ttrpc.status_code";
/// What is the daemon's fault, as otelttrpc has it; all else is the client's to judge.
const FAULTS: [Code; 6] = [
    Code::UNKNOWN,
    Code::DEADLINE_EXCEEDED,
    Code::UNIMPLEMENTED,
    Code::INTERNAL,
    Code::UNAVAILABLE,
    Code::DATA_LOSS,
];

/// Makes the spans of requests.
#[derive(Clone, Debug)]
pub(super) struct Tracer {
    tracer: SdkTracer,
    makes_roots: bool,
}

/// The span of a request.
#[derive(Debug)]
pub(super) struct RequestSpan {
    tracer: SdkTracer,
    context: Context,
}

/// A request that is not answered yet. Dropping it says that it never is, by this daemon.
pub(super) struct Open<'a>(&'a RequestSpan);

impl Tracer {
    /// `makes_roots`: a request without a trace can be the beginning of one.
    pub(super) fn new(tracer: SdkTracer, makes_roots: bool) -> Self {
        Self {
            tracer,
            makes_roots,
        }
    }

    /// The span of a request that begins now, if it has one. What is no known method has none,
    /// as with Go's server: its name would be the client's to choose.
    pub(super) fn begin(&self, call: &Call) -> Option<Arc<RequestSpan>> {
        let parent = parent::of(&call.metadata);
        let is_wanted = parent
            .as_ref()
            .map_or(self.makes_roots, SpanContext::is_sampled);
        if !is_wanted {
            return None;
        }
        let method = known_method(&call.method)?;
        let subject = Subject::of(call)?;
        let parent = match parent {
            Some(parent) => Context::new().with_remote_span_context(parent),
            None => Context::new(),
        };
        let builder = SpanBuilder::from_name(format!("{}/{method}", call.service))
            .with_kind(SpanKind::Server);
        let mut span = self.tracer.build_with_context(builder, &parent);
        if !span.is_recording() {
            return None;
        }
        span.set_attribute(KeyValue::new("rpc.system", "ttrpc"));
        span.set_attribute(KeyValue::new("rpc.service", call.service.clone()));
        span.set_attribute(KeyValue::new("rpc.method", method));
        let ids = [
            ("containerd.namespace", subject.namespace.map(String::from)),
            ("container.id", subject.container.map(String::from)),
            ("containerd.exec.id", subject.exec.map(String::from)),
        ];
        for (name, id) in ids {
            if let Some(id) = id {
                span.set_attribute(KeyValue::new(name, id));
            }
        }
        if call.is_replay {
            span.set_attribute(KeyValue::new("embedshim.replayed", true));
        }
        Some(Arc::new(RequestSpan {
            tracer: self.tracer.clone(),
            context: Context::new().with_span(span),
        }))
    }
}

impl<'a> Open<'a> {
    pub(super) fn new(span: &'a RequestSpan) -> Self {
        Self(span)
    }

    /// The request is answered.
    pub(super) fn end(self, answer: &Result<Vec<u8>, ttrpc::Status>) {
        let span = self.0.context.span();
        let code = match answer {
            Ok(_) => Code::OK,
            Err(refusal) => refusal.code(),
        };
        span.set_attribute(KeyValue::new(STATUS_CODE, i64::from(code as i32)));
        if FAULTS.contains(&code) {
            span.set_attribute(KeyValue::new("error.type", format!("{code:?}")));
            span.set_status(Status::error(""));
        }
        span.end();
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let span = self.0.context.span();
        if span.is_recording() {
            span.set_attribute(KeyValue::new("embedshim.unanswered", true));
            span.end();
        }
    }
}

impl CallObserver for RequestSpan {
    fn called(&self, call: EndedCall<'_>) {
        let builder = SpanBuilder::from_name(format!("{} {}", call.program, call.operation))
            .with_kind(SpanKind::Internal)
            .with_start_time(call.began);
        let mut span = self.tracer.build_with_context(builder, &self.context);
        let program = call.program.to_owned();
        span.set_attribute(KeyValue::new("process.executable.name", program));
        let code = call.status.and_then(|status| status.code());
        if let Some(code) = code {
            span.set_attribute(KeyValue::new("process.exit.code", i64::from(code)));
        }
        if let Some(signal) = call.status.and_then(|status| status.signal()) {
            span.set_attribute(KeyValue::new("embedshim.signal", i64::from(signal)));
        }
        if code != Some(0) {
            span.set_status(Status::error(""));
        }
        span.end();
    }
}

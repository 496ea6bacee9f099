//! [`Collector`]: an OpenTelemetry collector for one test: OTLP by HTTP, on a port of its own. Owns
//! the spans that it was sent.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, ensure};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use prost::Message;

/// A span as the collector was sent it.
#[derive(Clone, Debug)]
pub struct SentSpan {
    /// Its name.
    pub name: String,
    /// The trace, in hexadecimal digits, as all ids.
    pub trace: String,
    /// The span.
    pub id: String,
    /// The span above it; empty of a root.
    pub parent: String,
    /// OTLP's number: 1 is internal, 2 a server's.
    pub kind: i32,
    /// Nanoseconds since the epoch: begin and end.
    pub times: (u64, u64),
    /// Whether its status is an error.
    pub is_error: bool,
    /// The attributes, and those of who sent it.
    pub attributes: BTreeMap<String, String>,
}

impl SentSpan {
    /// An attribute; empty if there is none.
    pub fn attribute(&self, name: &str) -> &str {
        self.attributes.get(name).map_or("", String::as_str)
    }
}

#[derive(Debug, Default)]
struct Received {
    spans: Vec<SentSpan>,
    bodies: Vec<u8>,
}

/// A collector, for as long as this lives.
#[derive(Debug)]
pub struct Collector {
    address: SocketAddr,
    received: Arc<Mutex<Received>>,
    has_ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Collector {
    /// One that takes everything.
    pub fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let received: Arc<Mutex<Received>> = Arc::default();
        let has_ended = Arc::new(AtomicBool::new(false));
        let (ended, into) = (Arc::clone(&has_ended), Arc::clone(&received));
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                if ended.load(Ordering::Acquire) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                // A daemon that is killed while it sends.
                if let Ok(body) = serve(&stream)
                    && let Ok(request) = ExportTraceServiceRequest::decode(body.as_slice())
                {
                    let mut into = into.lock().unwrap_or_else(PoisonError::into_inner);
                    into.spans.extend(spans_of(request));
                    into.bodies.extend(body);
                }
            }
        });
        Ok(Self {
            address,
            received,
            has_ended,
            thread: Some(thread),
        })
    }

    /// What `telemetry.endpoint` has to be.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All spans that have come.
    pub fn spans(&self) -> Vec<SentSpan> {
        let received = self.received.lock();
        received
            .unwrap_or_else(PoisonError::into_inner)
            .spans
            .clone()
    }

    /// Whether this text was among what was sent, anywhere in it.
    pub fn has_been_sent(&self, text: &str) -> bool {
        let received = self.received.lock();
        let received = received.unwrap_or_else(PoisonError::into_inner);
        let mut windows = received.bodies.windows(text.len());
        windows.any(|window| window == text.as_bytes())
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.has_ended.store(true, Ordering::Release);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Reads one request and answers it; returns its body.
fn serve(stream: &TcpStream) -> anyhow::Result<Vec<u8>> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    ensure!(line == "POST /v1/traces HTTP/1.1\r\n", "{line}");
    let mut length = None;
    let mut is_protobuf = false;
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let header = line.trim().to_ascii_lowercase();
        if header.is_empty() {
            break;
        }
        is_protobuf |= header == "content-type: application/x-protobuf";
        if let Some(value) = header.strip_prefix("content-length:") {
            length = Some(value.trim().parse()?);
        }
    }
    ensure!(is_protobuf, "it is no protobuf");
    let mut body = vec![0; length.context("no length")?];
    reader.read_exact(&mut body)?;
    let mut stream = stream;
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
    Ok(body)
}

fn spans_of(request: ExportTraceServiceRequest) -> Vec<SentSpan> {
    let mut all = Vec::new();
    for of_resource in request.resource_spans {
        let resource = of_resource.resource.unwrap_or_default();
        let shared = attributes(&resource.attributes);
        for span in of_resource
            .scope_spans
            .into_iter()
            .flat_map(|scope| scope.spans)
        {
            let mut attributes = attributes(&span.attributes);
            attributes.extend(shared.clone());
            all.push(SentSpan {
                name: span.name,
                trace: hex(&span.trace_id),
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                kind: span.kind,
                times: (span.start_time_unix_nano, span.end_time_unix_nano),
                is_error: span
                    .status
                    .is_some_and(|status| status.code() == StatusCode::Error),
                attributes,
            });
        }
    }
    all
}

fn attributes(of: &[KeyValue]) -> BTreeMap<String, String> {
    let pairs = of.iter();
    pairs
        .map(|pair| (pair.key.clone(), text(pair.value.as_ref())))
        .collect()
}

fn text(value: Option<&AnyValue>) -> String {
    match value.and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::BoolValue(is)) => is.to_string(),
        other => format!("{other:?}"),
    }
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // A string takes everything.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

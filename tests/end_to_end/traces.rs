//! Traces: the spans that a collector gets of a daemon, and that nothing waits for a collector.

use std::net::TcpListener;
use std::thread;

use anyhow::{Context, ensure};
use embedshim_tests::{Bundle, Collector, SentSpan, Shim, Stage, Test};
use nix::sys::signal::Signal;
use testbed::sandbox::{PATIENCE, Running, Sandbox, until};

use crate::tests;

pub(crate) const OURS: [Test; 5] = tests!(WithoutContainerd:
    a_request_continues_the_trace_of_its_caller_with_the_runtimes_calls_below_it,
    a_request_of_no_trace_begins_one_where_the_configuration_says_so,
    what_a_killed_daemon_has_not_answered_continues_its_trace_in_the_next,
    a_daemon_that_leaves_sends_the_spans_that_it_has,
    a_dead_collector_holds_nothing_up,
);

/// Older ones do not name the caller's span to shims.
pub(crate) const TESTS: [Test; 1] = tests!(ContainerdTwo:
    a_request_continues_the_trace_of_containerd,
);

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";
const TASK: &str = "containerd.task.v3.Task";
/// So that a test does not wait for the next batch.
const AT_ONCE: &str = "50";
/// So that none comes.
const NEVER: &str = "3600000";

/// What a daemon says of a collector, once in a while.
const FAILING: &str = "the collector does not take spans";

fn traceparent(flags: &str) -> String {
    format!("00-{TRACE}-{PARENT}-{flags}")
}

/// A sandbox whose daemon will send spans to this address.
fn configured(stage: &Stage, endpoint: &str, roots: f64) -> anyhow::Result<Sandbox> {
    let mut sandbox = stage.bare_sandbox()?;
    let config = sandbox.directory().join("embedshim.toml");
    let text = format!("[telemetry]\nendpoint = {endpoint:?}\nroot_ratio = {roots:?}\n");
    std::fs::write(&config, text)?;
    sandbox.set_environment("EMBEDSHIM_CONFIG", &config.to_string_lossy());
    Ok(sandbox)
}

/// A daemon that sends spans to this address.
fn daemon(stage: &Stage, endpoint: &str, delay: &str) -> anyhow::Result<Sandbox> {
    let mut sandbox = configured(stage, endpoint, 0.0)?;
    sandbox.set_environment("OTEL_BSP_SCHEDULE_DELAY", delay);
    sandbox.start_daemon()?;
    Ok(sandbox)
}

fn span(spans: &[SentSpan], name: &str) -> anyhow::Result<SentSpan> {
    let mut found = spans.iter().filter(|span| span.name == name);
    let span = found
        .next()
        .with_context(|| format!("no {name}: {spans:?}"))?;
    ensure!(found.next().is_none(), "two of {name}: {spans:?}");
    Ok(span.clone())
}

/// A life with an exec, and a request that is refused.
fn live(shim: &Shim, sandbox: &Sandbox) -> anyhow::Result<()> {
    let bundle = Bundle::new(sandbox, "c", &["sleep", "1000"])?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    shim.exec_with("c", "e", &["true", "secret-argument"], |_| {})?;
    shim.start_exec("c", "e")?;
    ensure!(shim.wait_exec("c", "e")? == 0);
    shim.delete_exec("c", "e")?;
    shim.kill("c", Signal::SIGKILL)?;
    ensure!(shim.wait("c")? == 137);
    shim.delete("c")?;
    ensure!(shim.state("c").is_err(), "it is deleted");
    Ok(())
}

fn a_request_continues_the_trace_of_its_caller_with_the_runtimes_calls_below_it(
    stage: &Stage,
) -> anyhow::Result<()> {
    let collector = Collector::start()?;
    let sandbox = daemon(stage, &collector.endpoint(), AT_ONCE)?;
    // Of no trace, of one that is not sampled, of none that is valid: all before the others.
    for parent in [None, Some(traceparent("00")), Some("00-1-1-01".into())] {
        let shim = Shim::connect(&sandbox)?;
        let shim = match parent {
            Some(parent) => shim.with_metadata("traceparent", &parent),
            None => shim,
        };
        live(&shim, &sandbox)?;
    }
    let shim = Shim::connect(&sandbox)?.with_metadata("traceparent", &traceparent("01"));
    live(&shim, &sandbox)?;
    let last = format!("{TASK}/State");
    until("the last span has come", || {
        Ok(collector.spans().iter().any(|span| span.name == last))
    })
    .with_context(|| sandbox.daemon_log())?;
    let spans = collector.spans();
    ensure!(spans.iter().all(|span| span.trace == TRACE), "{spans:?}");
    for method in ["Create", "Exec", "Kill", "State"] {
        let span = span(&spans, &format!("{TASK}/{method}"))?;
        let is_of_caller = span.parent == PARENT && span.kind == 2;
        ensure!(is_of_caller && !span.is_error, "{span:?}");
        let code = if method == "State" { "5" } else { "0" };
        let exec = if method == "Exec" { "e" } else { "" };
        for (name, value) in [
            ("rpc.system", "ttrpc"),
            ("rpc.service", TASK),
            ("rpc.method", method),
            ("rpc.ttrpc.status_code", code),
            ("containerd.namespace", sandbox.namespace()),
            ("container.id", "c"),
            ("containerd.exec.id", exec),
            ("service.name", "embedshim"),
        ] {
            ensure!(span.attribute(name) == value, "{name}: {span:?}");
        }
    }
    let create = span(&spans, &format!("{TASK}/Create"))?;
    let starts = format!("{TASK}/Start");
    let mut starts = spans.iter().filter(|span| span.name == starts);
    let start = starts.find(|span| span.attribute("containerd.exec.id") == "e");
    let start = start.context("no start of the exec")?.clone();
    for (name, above) in [("runc create", create), ("runc exec", start)] {
        let call = span(&spans, name)?;
        let is_below = call.parent == above.id && call.kind == 1 && !call.is_error;
        let is_within = above.times.0 <= call.times.0 && call.times.1 <= above.times.1;
        let is_long = call.times.0 < call.times.1;
        ensure!(is_below && is_within && is_long, "{call:?}: {above:?}");
        ensure!(call.attribute("process.exit.code") == "0", "{call:?}");
    }
    for secret in ["secret-argument", "PATH=", "bundles"] {
        ensure!(!collector.has_been_sent(secret), "{secret}");
    }
    Ok(())
}

fn a_request_of_no_trace_begins_one_where_the_configuration_says_so(
    stage: &Stage,
) -> anyhow::Result<()> {
    let collector = Collector::start()?;
    let mut sandbox = configured(stage, &collector.endpoint(), 1.0)?;
    sandbox.set_environment("OTEL_BSP_SCHEDULE_DELAY", AT_ONCE);
    sandbox.start_daemon()?;
    let unsampled = Shim::connect(&sandbox)?.with_metadata("traceparent", &traceparent("00"));
    ensure!(
        unsampled.state("unsampled").is_err(),
        "there is no such task"
    );
    let shim = Shim::connect(&sandbox)?;
    ensure!(shim.state("absent").is_err(), "there is no such task");
    until("its span has come", || Ok(!collector.spans().is_empty()))?;
    let root = span(&collector.spans(), &format!("{TASK}/State"))?;
    let is_root = root.parent.is_empty() && root.trace != TRACE;
    ensure!(
        is_root && root.attribute("container.id") == "absent",
        "{root:?}"
    );
    Ok(())
}

fn what_a_killed_daemon_has_not_answered_continues_its_trace_in_the_next(
    stage: &Stage,
) -> anyhow::Result<()> {
    let collector = Collector::start()?;
    let sandbox = daemon(stage, &collector.endpoint(), AT_ONCE)?;
    let plain = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    plain.create("c", bundle.path())?;
    plain.start("c")?;
    let traced = Shim::connect(&sandbox)?.with_metadata("traceparent", &traceparent("01"));
    thread::scope(|scope| {
        let waiting = scope.spawn(|| traced.wait("c"));
        // The kill of the daemon must find it read.
        until("the request is in flight", || {
            Ok(in_flight(stage, &sandbox)?.contains("{method=\"Wait\"} 1\n"))
        })?;
        sandbox.kill_daemon()?;
        plain.kill("c", Signal::SIGKILL)?;
        let waited = waiting.join().ok().context("it panicked")??;
        ensure!(waited == 137, "{waited}");
        anyhow::Ok(())
    })?;
    plain.delete("c")?;
    until("its span has come", || Ok(!collector.spans().is_empty()))?;
    let spans = collector.spans();
    let wait = span(&spans, &format!("{TASK}/Wait"))?;
    let is_of_caller = (wait.trace.as_str(), wait.parent.as_str()) == (TRACE, PARENT);
    ensure!(is_of_caller, "{wait:?}");
    ensure!(wait.attribute("embedshim.replayed") == "true", "{wait:?}");
    Ok(())
}

/// The metric of requests in flight.
fn in_flight(stage: &Stage, sandbox: &Sandbox) -> anyhow::Result<String> {
    let text = crate::metrics::metrics(stage, sandbox)?;
    let lines = text
        .lines()
        .filter(|line| line.starts_with("embedshim_requests_in_flight"));
    Ok(lines.flat_map(|line| [line, "\n"]).collect())
}

fn a_daemon_that_leaves_sends_the_spans_that_it_has(stage: &Stage) -> anyhow::Result<()> {
    let collector = Collector::start()?;
    let sandbox = daemon(stage, &collector.endpoint(), NEVER)?;
    let shim = Shim::connect(&sandbox)?.with_metadata("traceparent", &traceparent("01"));
    ensure!(shim.state("absent").is_err(), "there is no such task");
    let plain = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    plain.create("c", bundle.path())?;
    plain.start("c")?;
    thread::scope(|scope| {
        let waiting = scope.spawn(|| shim.wait("c"));
        until("the request is in flight", || {
            Ok(in_flight(stage, &sandbox)?.contains("{method=\"Wait\"} 1\n"))
        })?;
        ensure!(collector.spans().is_empty(), "it was sent at once");
        sandbox.replace_daemon(Signal::SIGHUP)?;
        until("its spans have come", || Ok(collector.spans().len() == 2))
            .with_context(|| format!("{:?}: {}", collector.spans(), sandbox.daemon_log()))?;
        plain.kill("c", Signal::SIGKILL)?;
        let waited = waiting.join().ok().context("it panicked")??;
        ensure!(waited == 137, "{waited}");
        anyhow::Ok(())
    })?;
    let spans = collector.spans();
    let refused = span(&spans, &format!("{TASK}/State"))?;
    let wait = span(&spans, &format!("{TASK}/Wait"))?;
    for (span, is_unanswered) in [(refused, ""), (wait, "true")] {
        let unanswered = span.attribute("embedshim.unanswered");
        ensure!(unanswered == is_unanswered, "{span:?}");
    }
    Ok(())
}

/// It takes connections, and no more. In the end none takes them.
fn a_dead_collector_holds_nothing_up(stage: &Stage) -> anyhow::Result<()> {
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let endpoint = format!("http://{}", silent.local_addr()?);
    let sandbox = daemon(stage, &endpoint, AT_ONCE)?;
    let shim = Shim::connect(&sandbox)?.with_metadata("traceparent", &traceparent("01"));
    let lines = || sandbox.daemon_log().matches(FAILING).count();
    live(&shim, &sandbox)?;
    until("it is logged", || {
        live(&shim, &sandbox)?;
        Ok(lines() > 0)
    })?;
    drop(silent);
    // More than the queue holds, and all of it to a port that refuses: many batches fail.
    for _ in 0..2500 {
        ensure!(shim.state("absent").is_err(), "there is no such task");
    }
    live(&shim, &sandbox)?;
    sandbox.replace_daemon(Signal::SIGHUP)?;
    live(&shim, &sandbox)?;
    let log = sandbox.daemon_log();
    let daemons = log.matches("traces: spans are sent to a collector").count();
    ensure!(daemons == 2 && lines() <= daemons, "{log}");
    Ok(())
}

fn a_request_continues_the_trace_of_containerd(stage: &Stage) -> anyhow::Result<()> {
    let collector = Collector::start()?;
    let mut sandbox = configured(stage, &collector.endpoint(), 0.0)?;
    // containerd's: the launcher passes none of them on to the daemon.
    sandbox.set_environment("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.endpoint());
    sandbox.set_environment("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf");
    sandbox.set_environment("OTEL_SERVICE_NAME", "its-containerd");
    sandbox.set_environment("OTEL_TRACES_SAMPLER", "always_on");
    sandbox.set_environment("OTEL_BSP_SCHEDULE_DELAY", AT_ONCE);
    sandbox.start_containerd()?;
    sandbox.import(stage.archive())?;
    let mut run = sandbox.run(&["--rm"], "c", &["true"]);
    let finished = Running::capture(&mut run)?.finish(PATIENCE)?;
    ensure!(finished.code == Some(0), "{finished:?}");
    // Which version of the service containerd calls is its choice.
    let of = |service: &str, name: &str| {
        let mut spans = collector.spans().into_iter();
        let is_of = |span: &SentSpan| span.attribute("service.name") == service;
        spans.find(|span| is_of(span) && span.name.ends_with(name))
    };
    for method in ["Create", "Start", "Delete"] {
        let name = format!(".Task/{method}");
        let mut both = None;
        until("both have sent their span", || {
            both = of("its-containerd", &name).zip(of("embedshim", &name));
            Ok(both.is_some())
        })
        .with_context(|| format!("{method}: {:?}", collector.spans()))?;
        let (above, below) = both.context("no spans")?;
        let is_below = below.trace == above.trace && below.parent == above.id;
        // A client's, and a server's.
        ensure!(
            is_below && (above.kind, below.kind) == (3, 2),
            "{above:?}: {below:?}"
        );
        ensure!(below.attribute("container.id") == "c", "{below:?}");
    }
    Ok(())
}

//! Bytes, names and paths that containerd would never send: refused as Go's server does, and the
//! daemon unharmed.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use containerd_shim_protos::api;
use embedshim_tests::{Bundle, Footprint, Shim, Stage, Test};
use protobuf::Message;
use shim_api::frame::{self, HEADER, Header, Kind};
use testbed::sandbox::{PATIENCE, Sandbox};
use ttrpc::context::Context as Metadata;
use ttrpc::{Code, Request, Response};

use crate::tests;

pub(crate) const TESTS: [Test; 8] = tests!(WithoutContainerd:
    frames_that_are_not_calls_are_refused_and_the_connection_goes_on,
    an_oversized_frame_is_skipped_and_refused,
    a_truncated_frame_ends_its_connection_only,
    garbage_ends_its_connection_only,
    unknown_services_and_methods_are_unimplemented,
    names_that_are_no_identifiers_are_refused,
    a_call_without_a_namespace_is_refused,
    a_create_whose_namespace_is_not_known_names_what_is_wrong_with_the_note,
);

/// A connection on which anything can be said.
struct Wire(UnixStream);

impl Wire {
    fn connect(sandbox: &Sandbox) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(sandbox.state_dir().join("shim.sock"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(stream))
    }

    fn send(&mut self, header: Header, payload: &[u8]) -> anyhow::Result<()> {
        self.0.write_all(&header.encode())?;
        Ok(self.0.write_all(payload)?)
    }

    fn call(&mut self, stream: u32, service: &str, method: &str) -> anyhow::Result<Response> {
        let request = Request {
            service: service.into(),
            method: method.into(),
            ..Request::default()
        };
        self.0
            .write_all(&frame::request(stream, &request).context("too long")?)?;
        self.answer(stream)
    }

    fn answer(&mut self, stream: u32) -> anyhow::Result<Response> {
        let mut header = [0; HEADER];
        self.0.read_exact(&mut header)?;
        let header = Header::decode(header);
        ensure!(
            header.stream == stream && header.kind == Kind::Response,
            "{header:?}"
        );
        let mut payload = vec![0; usize::try_from(header.length)?];
        self.0.read_exact(&mut payload)?;
        Ok(Response::parse_from_bytes(&payload)?)
    }

    fn refusal(&mut self, stream: u32, code: Code, words: &str) -> anyhow::Result<()> {
        let answer = self.answer(stream)?;
        let status = answer.status();
        ensure!(
            status.code() == code && status.message.contains(words),
            "{status:?}"
        );
        Ok(())
    }
}

fn header(length: usize, stream: u32, kind: Kind) -> Header {
    Header {
        length: u32::try_from(length).unwrap_or(u32::MAX),
        stream,
        kind,
        flags: 0,
    }
}

fn with_daemon(stage: &Stage) -> anyhow::Result<Sandbox> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    Ok(sandbox)
}

/// The daemon is the same one and still does its work.
fn unharmed(sandbox: &Sandbox, pid: Option<i32>) -> anyhow::Result<()> {
    ensure!(
        sandbox.daemon_pid() == pid && pid.is_some(),
        "the daemon is gone: {}",
        sandbox.daemon_log()
    );
    let bundle = Bundle::new(sandbox, "after", &["sh", "-c", "exit 3"])?;
    let shim = Shim::connect(sandbox)?;
    shim.create("after", bundle.path())?;
    shim.start("after")?;
    ensure!(
        shim.wait("after")? == 3 && shim.delete("after")? == 3,
        "it does not work any more"
    );
    ensure!(
        !sandbox.daemon_log().contains("panic"),
        "{}",
        sandbox.daemon_log()
    );
    Ok(())
}

fn frames_that_are_not_calls_are_refused_and_the_connection_goes_on(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = with_daemon(stage)?;
    let pid = sandbox.daemon_pid();
    let mut wire = Wire::connect(&sandbox)?;
    wire.send(header(0, 2, Kind::Request), b"")?;
    wire.refusal(2, Code::INVALID_ARGUMENT, "StreamID must be odd")?;
    wire.send(header(3, 1, Kind::Request), b"\xff\xff\xff")?;
    wire.refusal(1, Code::INVALID_ARGUMENT, "unmarshal request error")?;
    wire.send(header(0, 1, Kind::Request), b"")?;
    wire.refusal(1, Code::INVALID_ARGUMENT, "must increment")?;
    wire.send(header(4, 1, Kind::Data), b"data")?;
    wire.refusal(1, Code::INVALID_ARGUMENT, "no longer active")?;
    wire.send(header(4, 5, Kind::Unknown(77)), b"what")?;
    wire.send(header(4, 5, Kind::Response), b"what")?;
    let answer = wire.call(7, "containerd.task.v2.Task", "Shutdown")?;
    ensure!(answer.status().code() == Code::OK, "{answer:?}");
    unharmed(&sandbox, pid)
}

fn an_oversized_frame_is_skipped_and_refused(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = with_daemon(stage)?;
    let pid = sandbox.daemon_pid();
    let mut wire = Wire::connect(&sandbox)?;
    let payload = vec![0; (4 << 20) + 1];
    wire.send(header(payload.len(), 1, Kind::Request), &payload)?;
    wire.refusal(1, Code::RESOURCE_EXHAUSTED, "exceed maximum message size")?;
    let answer = wire.call(3, "containerd.task.v3.Task", "Shutdown")?;
    ensure!(answer.status().code() == Code::OK, "{answer:?}");
    unharmed(&sandbox, pid)
}

fn a_truncated_frame_ends_its_connection_only(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = with_daemon(stage)?;
    let pid = sandbox.daemon_pid();
    for length in 1..HEADER {
        let mut wire = Wire::connect(&sandbox)?;
        wire.0
            .write_all(&header(100, 1, Kind::Request).encode()[..length])?;
    }
    let mut wire = Wire::connect(&sandbox)?;
    wire.send(header(100, 1, Kind::Request), b"not a hundred bytes")?;
    drop(wire);
    unharmed(&sandbox, pid)
}

fn garbage_ends_its_connection_only(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = with_daemon(stage)?;
    let pid = sandbox.daemon_pid();
    // A small generator, always the same numbers: a failure can be repeated.
    let mut seed: u32 = 12_345;
    let mut byte = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 24) as u8
    };
    for _ in 0..200 {
        let mut wire = Wire::connect(&sandbox)?;
        let bytes: Vec<u8> = (0..usize::from(byte()) * 4).map(|_| byte()).collect();
        // It may have been hung up on already.
        let _ = wire.0.write_all(&bytes);
        wire.0.set_read_timeout(Some(Duration::from_millis(1)))?;
        let _ = wire.0.read(&mut [0; 64]);
    }
    unharmed(&sandbox, pid)
}

fn unknown_services_and_methods_are_unimplemented(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = with_daemon(stage)?;
    let mut wire = Wire::connect(&sandbox)?;
    for (stream, service, method) in [
        (1, "containerd.task.v9.Task", "State"),
        (3, "containerd.task.v2.Task", "Dance"),
    ] {
        let answer = wire.call(stream, service, method)?;
        ensure!(answer.status().code() == Code::UNIMPLEMENTED, "{answer:?}");
    }
    Ok(())
}

fn names_that_are_no_identifiers_are_refused(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = with_daemon(stage)?;
    let pid = sandbox.daemon_pid();
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sleep", "1000"])?;
    let before = Footprint::of(&sandbox);
    let long = "a".repeat(77);
    let names = [
        "../x", "..", ".", "", "a/b", "/etc", "-rf", "a\0b", "a b", "a\nb", &long,
    ];
    for name in names {
        match shim.create(name, bundle.path()) {
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == Code::INVALID_ARGUMENT => {}
            other => bail!("{name:?}: {other:?}"),
        }
    }
    before.wait_for_return(&sandbox)?;
    shim.create("c", bundle.path())?;
    shim.start("c")?;
    for name in names.into_iter().filter(|name| !name.is_empty()) {
        let request = api::ExecProcessRequest {
            id: "c".into(),
            exec_id: name.into(),
            ..api::ExecProcessRequest::default()
        };
        match shim.tasks.exec(shim.metadata(), &request) {
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == Code::INVALID_ARGUMENT => {}
            other => bail!("exec {name:?}: {other:?}"),
        }
    }
    ensure!(shim.state("c")?.pid > 0, "the container is gone");
    unharmed(&sandbox, pid)
}

fn a_call_without_a_namespace_is_refused(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = with_daemon(stage)?;
    let mut wire = Wire::connect(&sandbox)?;
    let answer = wire.call(1, "containerd.task.v2.Task", "State")?;
    let status = answer.status();
    ensure!(
        status.code() == Code::FAILED_PRECONDITION
            && status.message.contains("namespace is required")
            && status.message.contains("its metadata"),
        "{status:?}"
    );
    Ok(())
}

/// Debian's containerd says the namespace to the launcher only.
fn a_create_whose_namespace_is_not_known_names_what_is_wrong_with_the_note(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = with_daemon(stage)?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["true"])?;
    let create = || {
        let request = api::CreateTaskRequest {
            id: "c".into(),
            bundle: bundle.path().to_string_lossy().into_owned(),
            ..api::CreateTaskRequest::default()
        };
        let created = shim.tasks.create(Metadata::default(), &request);
        created.map_or_else(|error| error.to_string(), |_| "it was created".into())
    };
    let at = bundle.path().display().to_string();
    for (note, words) in [
        (None, "has left no note in"),
        (Some("{ no json"), "cannot be read: key must be a string"),
        (Some(r#"{"namespace": "../x"}"#), "../x"),
    ] {
        if let Some(note) = note {
            fs::write(bundle.path().join("embedshim.json"), note)?;
        }
        let refusal = create();
        ensure!(
            refusal.contains(&at) && refusal.contains(words),
            "{words}: {refusal}"
        );
    }
    Ok(())
}

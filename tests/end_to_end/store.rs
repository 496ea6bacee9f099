//! The descriptor store: what a container takes of it, and what becomes of it when the keeper is
//! stopped or full.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use containerd_shim_protos::api;
use embedshim_tests::{
    Bundle, Crowd, Footprint, Kind, Reader, Shim, Stage, Stored, Test, raise_open_files, writer,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protobuf::Message;
use shim_api::frame::{self, HEADER, Header};
use testbed::image;
use testbed::sandbox::{self, PATIENCE, Sandbox, until};
use ttrpc::proto::KeyValue;
use ttrpc::{Code, Request, Response};

use crate::tests;

pub(crate) const TESTS: [Test; 7] = tests!(WithoutContainerd:
    twelve_thousand_descriptors_outlive_a_killed_daemon,
    a_daemon_that_is_killed_while_it_accepts_loses_no_connection,
    what_was_sent_to_a_stopped_keeper_is_kept_when_it_goes_on,
    a_stopped_keeper_holds_up_no_end_of_a_stream,
    a_container_with_three_streams_takes_two_places_beside_its_connection,
    a_container_with_three_streams_takes_as_many_open_files_as_operating_md_says,
    a_connection_without_a_task_costs_little_and_nothing_when_its_containerd_has_died,
);

fn kept(sandbox: &Sandbox) -> anyhow::Result<usize> {
    let keeper = sandbox.keeper_pid().context("no keeper")?;
    let entries = fs::read_dir(format!("/proc/{keeper}/fd"))?.flatten();
    let is_socket = |path: &Path| {
        fs::read_link(path).is_ok_and(|link| link.to_string_lossy().starts_with("socket:"))
    };
    Ok(entries.filter(|entry| is_socket(&entry.path())).count())
}

fn stop(sandbox: &Sandbox) -> anyhow::Result<Pid> {
    let keeper = Pid::from_raw(sandbox.keeper_pid().context("no keeper")?);
    sandbox::stop(keeper)?;
    Ok(keeper)
}

/// Kills at many instants of accepting and of the first request: containerd destroys the container
/// of a connection that ends.
fn a_daemon_that_is_killed_while_it_accepts_loses_no_connection(
    stage: &Stage,
) -> anyhow::Result<()> {
    const ROUNDS: u64 = 60;
    const CONNECTIONS: usize = 200;
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    for round in 0..ROUNDS {
        let daemon = sandbox.daemon_pid().context("no daemon")?;
        let asked = std::thread::scope(|scope| {
            let asking = scope.spawn(|| {
                (0..CONNECTIONS)
                    .map(|_| ask(&sandbox, "c"))
                    .collect::<anyhow::Result<Vec<_>>>()
            });
            std::thread::sleep(Duration::from_micros(200 * round));
            let killed = kill(Pid::from_raw(daemon), Signal::SIGKILL);
            let asked = asking.join();
            killed?;
            asked.map_err(|_| anyhow::anyhow!("it panicked"))?
        })?;
        sandbox.successor_of(daemon)?;
        for (number, connection) in asked.into_iter().enumerate() {
            answered(connection)
                .with_context(|| format!("kill {round}, connection {number}"))
                .with_context(|| sandbox.daemon_log())?;
        }
    }
    Ok(())
}

fn what_was_sent_to_a_stopped_keeper_is_kept_when_it_goes_on(stage: &Stage) -> anyhow::Result<()> {
    const CONTAINERS: usize = 8;
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let before = kept(&sandbox)?;
    let keeper = stop(&sandbox)?;
    // A queue that is full, and more than it holds.
    let others = (0..300)
        .map(|_| Shim::connect(&sandbox))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut containers = Vec::new();
    for number in 0..CONTAINERS {
        let id = format!("c{number}");
        let bundle = Bundle::new(&sandbox, &id, &["sh", "-c", "sleep 1000 & wait"])?;
        let reader = Reader::new(&sandbox, &format!("{id}-out"))?;
        let shim = Shim::connect(&sandbox)?;
        shim.create_with(&id, bundle.path(), |request| request.stdout = reader.path())?;
        shim.start(&id)?;
        containers.push((id, shim, reader));
    }
    drop(others);
    kill(keeper, Signal::SIGCONT)?;
    until("everything is kept", || {
        Ok(kept(&sandbox)? == before + 3 * CONTAINERS)
    })?;
    sandbox.kill_daemon()?;
    for (id, shim, reader) in &mut containers {
        shim.kill(id, Signal::SIGKILL).with_context(|| id.clone())?;
        ensure!(shim.wait(id)? == 137, "not 137");
        reader.finish()?;
        shim.delete(id)?;
    }
    Ok(())
}

/// Its client reads the end although the keeper lets go of nothing.
fn a_stopped_keeper_holds_up_no_end_of_a_stream(stage: &Stage) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["sh", "-c", "busybox cat; exit 3"])?;
    let (stdin, input) = writer(&sandbox, "in")?;
    let mut reader = Reader::new(&sandbox, "out")?;
    shim.create_with("c", bundle.path(), |request| {
        request.stdin = stdin.display().to_string();
        request.stdout = reader.path();
    })?;
    shim.start("c")?;
    let keeper = stop(&sandbox)?;
    drop(input);
    shim.close_stdin("c")?;
    let result = reader.finish();
    let code = shim.wait("c")?;
    let deleted = shim.delete("c");
    kill(keeper, Signal::SIGCONT)?;
    ensure!(result?.is_empty() && code == 3 && deleted? == 3, "not 3");
    Ok(())
}

fn a_container_with_three_streams_takes_two_places_beside_its_connection(
    stage: &Stage,
) -> anyhow::Result<()> {
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let before = Footprint::of(&sandbox);
    let places = kept(&sandbox)?;
    let shim = Shim::connect(&sandbox)?;
    let bundle = Bundle::new(&sandbox, "c", &["busybox", "cat"])?;
    let (stdin, _input) = writer(&sandbox, "in")?;
    let readers = [Reader::new(&sandbox, "out")?, Reader::new(&sandbox, "err")?];
    shim.create_with("c", bundle.path(), |request| {
        request.stdin = stdin.display().to_string();
        request.stdout = readers[0].path();
        request.stderr = readers[1].path();
    })?;
    shim.start("c")?;
    until("they are kept", || Ok(kept(&sandbox)? == places + 3))?;
    sandbox.kill_daemon()?;
    // A moment ago it had its own beside its predecessor's.
    until("the next has taken them over", || {
        Ok(kept(&sandbox)? == places + 3)
    })?;
    shim.kill("c", Signal::SIGKILL)?;
    shim.wait("c")?;
    shim.delete("c")?;
    until("they are let go", || Ok(kept(&sandbox)? == places + 1))?;
    before.wait_for_return(&sandbox)
}

/// The figures of docs/operating.md, "Limits".
fn a_container_with_three_streams_takes_as_many_open_files_as_operating_md_says(
    stage: &Stage,
) -> anyhow::Result<()> {
    const CONTAINERS: usize = 10;
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let before = Cost::now(&sandbox)?;
    let mut containers = Vec::new();
    for number in 0..CONTAINERS {
        let id = format!("c{number}");
        let bundle = Bundle::new(&sandbox, &id, &["busybox", "cat"])?;
        let (stdin, input) = writer(&sandbox, &format!("{id}-in"))?;
        let readers = [
            Reader::new(&sandbox, &format!("{id}-out"))?,
            Reader::new(&sandbox, &format!("{id}-err"))?,
        ];
        let shim = Shim::connect(&sandbox)?;
        shim.create_with(&id, bundle.path(), |request| {
            request.stdin = stdin.display().to_string();
            request.stdout = readers[0].path();
            request.stderr = readers[1].path();
        })?;
        shim.start(&id)?;
        containers.push((id, shim, input, readers));
    }
    let each = |with: usize, before: usize| with.saturating_sub(before) / CONTAINERS;
    let mut figures = (0, 0);
    // Of the daemon's, three are duplicates of what the keeper has, for a keeper that dies.
    let reached = until("each container has what it keeps", || {
        let now = Cost::now(&sandbox)?;
        figures = (
            each(now.daemons_descriptors, before.daemons_descriptors),
            each(now.keepers_descriptors, before.keepers_descriptors),
        );
        Ok(figures == (18, 3))
    });
    for (id, shim, ..) in &containers {
        shim.kill(id, Signal::SIGKILL)?;
        shim.wait(id)?;
        shim.delete(id)?;
    }
    reached.with_context(|| format!("daemon and keeper have {figures:?} files for each"))
}

/// What each connection has of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cost {
    daemons_descriptors: usize,
    keepers_descriptors: usize,
    journals: usize,
    /// Of daemon and keeper, in kB.
    memory: usize,
}

impl Cost {
    fn now(sandbox: &Sandbox) -> anyhow::Result<Self> {
        let entries = |path: &Path| fs::read_dir(path).map(Iterator::count);
        let [daemon, keeper] = [sandbox.daemon_pid(), sandbox.keeper_pid()]
            .map(|pid| pid.map(|pid| PathBuf::from(format!("/proc/{pid}"))));
        let (daemon, keeper) = (daemon.context("no daemon")?, keeper.context("no keeper")?);
        let mut memory = 0;
        for process in [&daemon, &keeper] {
            let text = fs::read_to_string(process.join("smaps_rollup"))?;
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix("Anonymous:"));
            let number = line.and_then(|line| line.split_whitespace().next());
            memory += number.context("no memory")?.parse::<usize>()?;
        }
        Ok(Self {
            daemons_descriptors: entries(&daemon.join("fd"))?,
            keepers_descriptors: entries(&keeper.join("fd"))?,
            journals: entries(&sandbox.state_dir().join("connections"))?,
            memory,
        })
    }
}

/// A connection with a request on it: who is there?
fn ask(sandbox: &Sandbox, id: &str) -> anyhow::Result<UnixStream> {
    let request = api::ConnectRequest {
        id: id.into(),
        ..api::ConnectRequest::default()
    };
    let namespace = KeyValue {
        key: "containerd-namespace-ttrpc".into(),
        value: sandbox.namespace().into(),
        ..KeyValue::default()
    };
    let request = Request {
        service: "containerd.task.v2.Task".into(),
        method: "Connect".into(),
        payload: request.write_to_bytes()?,
        metadata: vec![namespace],
        ..Request::default()
    };
    let mut stream = UnixStream::connect(sandbox.state_dir().join("shim.sock"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&frame::request(1, &request).context("too long")?)?;
    Ok(stream)
}

/// The same connection once it was answered.
fn answered(mut stream: UnixStream) -> anyhow::Result<UnixStream> {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header)?;
    let mut payload = vec![0; usize::try_from(Header::decode(header).length)?];
    stream.read_exact(&mut payload)?;
    let response = Response::parse_from_bytes(&payload)?;
    ensure!(response.status().code() == Code::OK, "{response:?}");
    Ok(stream)
}

/// A connection as containerd 1.6 makes it for a bundle that its predecessor has left before
/// `Create`, and keeps: it asks who is there, and never anything again.
fn ask_who_is_there(sandbox: &Sandbox, id: &str) -> anyhow::Result<UnixStream> {
    answered(ask(sandbox, id)?)
}

/// containerd 1.6 keeps some each time it is killed; with its own shims each would be a process.
fn a_connection_without_a_task_costs_little_and_nothing_when_its_containerd_has_died(
    stage: &Stage,
) -> anyhow::Result<()> {
    const MANY: usize = 500;
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    let without = |cost: &Cost| (cost.journals, cost.keepers_descriptors);
    let idle = Cost::now(&sandbox)?;
    drop(ask_who_is_there(&sandbox, "first")?);
    let mut before = idle;
    until("the first is gone", || {
        before = Cost::now(&sandbox)?;
        Ok(without(&before) == without(&idle))
    })?;
    let connections = (0..MANY)
        .map(|number| ask_who_is_there(&sandbox, &format!("c{number}")))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut with = before;
    until("each is kept", || {
        with = Cost::now(&sandbox)?;
        Ok(with.keepers_descriptors >= before.keepers_descriptors + MANY)
    })?;
    let memory = with.memory.saturating_sub(before.memory);
    println!("{MANY} connections without a task: {memory} kB of memory; {before:?}, {with:?}");
    // In the daemon a socket, its duplicate for a keeper that dies, and its journal; in the keeper
    // the socket.
    ensure!(
        with.daemons_descriptors <= before.daemons_descriptors + 3 * MANY
            && with.keepers_descriptors == before.keepers_descriptors + MANY
            && memory < 16 * MANY,
        "{before:?}, {with:?}"
    );
    drop(connections);
    until("nothing is left of them", || {
        let after = Cost::now(&sandbox)?;
        let is_less = after.daemons_descriptors <= before.daemons_descriptors;
        Ok(without(&after) == without(&before) && is_less)
    })
}

/// More of them, for which more files have to be open than this test may have, are killed by
/// `cargo xtask test-systemd twenty_thousand`.
fn twelve_thousand_descriptors_outlive_a_killed_daemon(stage: &Stage) -> anyhow::Result<()> {
    const CONTAINERS: usize = 1_000;
    let sandbox = stage.bare_sandbox()?;
    sandbox.start_daemon()?;
    raise_open_files()?;
    let runtime = sandbox.directory().join("echo");
    image::compile_echo_runtime(&runtime)?;
    let keeper = sandbox.keeper_pid().context("no keeper")?;
    let before = Stored::by(keeper)?;
    let (state_dir, directory) = (sandbox.state_dir(), sandbox.directory());
    let mut crowd = Crowd::new(&state_dir, sandbox.namespace(), directory, &runtime)?;
    crowd.add(CONTAINERS / 10, Kind::Running)?;
    crowd.add(CONTAINERS * 9 / 10, Kind::Created)?;
    let stored = Stored::by(keeper)?.since(before);
    ensure!(stored.all() >= 12 * CONTAINERS, "{stored:?}");
    sandbox.kill_daemon()?;
    crowd.ensure_flowing()
}

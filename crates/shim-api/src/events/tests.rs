//! Outboxes with a containerd's listener at the other end: what is delivered when one of the two
//! dies.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::events::task::{TaskExit, TaskStart};
use containerd_shim_protos::{Events, create_events};
use embedshim_core::event::EventKind;
use ttrpc::{Server, TtrpcContext};

use super::*;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// The events that arrived: topic and pid.
type Received = Arc<Mutex<Vec<(String, u32)>>>;

/// containerd's side. Another listener on the same path is containerd after a restart.
struct Listener {
    received: Received,
    path: PathBuf,
    server: Server,
}

#[derive(Clone)]
struct Service(Received);

impl Events for Service {
    fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let (topic, value) = (&request.envelope.topic, &request.envelope.event.value);
        let pid = match topic.as_str() {
            "/tasks/start" => TaskStart::parse_from_bytes(value).unwrap().pid,
            "/tasks/exit" => TaskExit::parse_from_bytes(value).unwrap().pid,
            "/tasks/oom" => return Err(ttrpc::Error::RpcStatus(status::invalid("never"))),
            _ => 0,
        };
        self.0.lock().unwrap().push((topic.clone(), pid));
        Ok(Empty::new())
    }
}

impl Listener {
    fn listen(path: &Path) -> Self {
        let _ = fs::remove_file(path);
        let received = Received::default();
        let mut server = Server::new()
            .bind(&format!("unix://{}", path.display()))
            .unwrap()
            .register_service(create_events(Arc::new(Service(Arc::clone(&received)))));
        server.start().unwrap();
        Self {
            received,
            path: path.to_owned(),
            server,
        }
    }

    fn pids(&self) -> Vec<u32> {
        let received = self.received.lock().unwrap();
        received.iter().map(|(_, pid)| *pid).collect()
    }

    async fn wait_for(&self, pids: &[u32]) {
        until(|| self.pids().len() >= pids.len()).await;
        assert_eq!(self.pids(), pids);
    }

    async fn stop(mut self) {
        tokio::task::spawn_blocking(move || {
            std::mem::take(&mut self.server).shutdown();
            fs::remove_file(&self.path).unwrap();
        })
        .await
        .unwrap();
    }
}

async fn until(condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "nothing for 20 s");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn event(owner: &Path, id: &str, kind: EventKind) -> Event {
    Event {
        namespace: "n".parse().unwrap(),
        id: id.parse().unwrap(),
        owner: owner.display().to_string(),
        at: SystemTime::now(),
        kind,
    }
}

fn started(pid: u32) -> EventKind {
    EventKind::Started { pid }
}

fn exited(pid: u32) -> EventKind {
    EventKind::Exited {
        exec: None,
        pid,
        exit_code: 0,
        exited_at: SystemTime::now(),
    }
}

fn deleted(pid: u32) -> EventKind {
    EventKind::Deleted {
        pid,
        exit_code: 0,
        exited_at: SystemTime::now(),
    }
}

/// A state directory, and the address of a containerd.
fn scene() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let (state, socket) = (
        directory.path().join("events"),
        directory.path().join("c.sock"),
    );
    (directory, state, socket)
}

#[tokio::test]
async fn events_that_a_predecessor_left_are_sent_first_and_in_order() {
    let (_directory, state, socket) = scene();
    let outboxes = Outboxes::open(state.clone()).unwrap();
    outboxes.start();
    for pid in 1..=5 {
        outboxes.accept(event(&socket, "c", started(pid)));
    }
    drop(outboxes);
    let outboxes = Outboxes::open(state).unwrap();
    outboxes.accept(event(&socket, "c", started(6)));
    outboxes.start();
    let listener = Listener::listen(&socket);
    listener.wait_for(&[1, 2, 3, 4, 5, 6]).await;
}

#[tokio::test]
async fn what_was_acknowledged_is_not_sent_again() {
    let (_directory, state, socket) = scene();
    let listener = Listener::listen(&socket);
    let outboxes = Outboxes::open(state.clone()).unwrap();
    outboxes.start();
    for pid in 1..=3 {
        outboxes.accept(event(&socket, "c", started(pid)));
    }
    let outbox = outboxes.outbox(&socket.display().to_string());
    until(|| outbox.first().is_none()).await;
    drop((outboxes, outbox));
    let outboxes = Outboxes::open(state.clone()).unwrap();
    assert_eq!(fs::read_dir(state).unwrap().count(), 0);
    outboxes.start();
    outboxes.accept(event(&socket, "c", started(4)));
    listener.wait_for(&[1, 2, 3, 4]).await;
}

#[tokio::test]
async fn neither_an_absent_containerd_nor_a_refused_event_delays_others() {
    let (directory, state, socket) = scene();
    let listener = Listener::listen(&socket);
    let outboxes = Outboxes::open(state).unwrap();
    outboxes.start();
    let absent = directory.path().join("absent.sock");
    outboxes.accept(event(&absent, "c", started(1)));
    outboxes.accept(event(Path::new(""), "c", started(1)));
    outboxes.accept(event(Path::new(&"/x".repeat(100)), "c", started(1)));
    outboxes.accept(event(&socket, "c", EventKind::Oom));
    outboxes.accept(event(&socket, "c", started(2)));
    listener.wait_for(&[2]).await;
}

#[tokio::test]
async fn an_event_that_cannot_be_noted_is_sent_nevertheless() {
    let (_directory, state, socket) = scene();
    let listener = Listener::listen(&socket);
    let outboxes = Outboxes::open(state.clone()).unwrap();
    fs::remove_dir(&state).unwrap();
    outboxes.accept(event(&socket, "c", started(1)));
    fs::create_dir(&state).unwrap();
    outboxes.accept(event(&socket, "c", started(2)));
    outboxes.start();
    listener.wait_for(&[1, 2]).await;
    let outbox = outboxes.outbox(&socket.display().to_string());
    until(|| outbox.first().is_none()).await;
    drop((outboxes, outbox));
    Outboxes::open(state.clone()).unwrap();
    assert_eq!(fs::read_dir(state).unwrap().count(), 0);
}

#[tokio::test]
async fn a_backlog_tells_what_waits_since_when_and_what_was_acknowledged() {
    let (_directory, store, socket) = scene();
    let outboxes = Outboxes::open(store).unwrap();
    outboxes.start();
    let first = event(&socket, "c", started(1));
    let began = first.at;
    outboxes.accept(first);
    outboxes.accept(event(&socket, "c", started(2)));
    let told = || outboxes.backlogs().pop().unwrap();
    let before = told();
    assert_eq!((before.events, before.acknowledged, before.lost), (2, 0, 0));
    assert_eq!(before.address, socket.to_str().unwrap());
    assert_eq!(before.oldest, Some(began));
    let listener = Listener::listen(&socket);
    listener.wait_for(&[1, 2]).await;
    until(|| told().events == 0).await;
    let after = told();
    assert_eq!(
        (after.bytes, after.acknowledged, after.oldest),
        (0, 2, None)
    );
}

#[tokio::test]
async fn of_too_many_events_the_oldest_are_lost_on_disk_too() {
    let (_directory, state, socket) = scene();
    let outboxes = Outboxes::open(state.clone()).unwrap();
    for pid in 1..=10_002 {
        outboxes.accept(event(&socket, "c", started(pid)));
    }
    drop(outboxes);
    let listener = Listener::listen(&socket);
    let outboxes = Outboxes::open(state).unwrap();
    outboxes.start();
    let expected: Vec<u32> = (3..=10_002).collect();
    listener.wait_for(&expected).await;
}

#[tokio::test]
async fn exits_of_tasks_that_are_not_deleted_are_sent_again_after_containerds_restart() {
    let (_directory, state, socket) = scene();
    let listener = Listener::listen(&socket);
    let outboxes = Outboxes::open(state).unwrap();
    outboxes.start();
    for (id, pid) in [("early", 1), ("gone", 2), ("late", 3)] {
        outboxes.accept(event(&socket, id, started(pid)));
        outboxes.accept(event(&socket, id, exited(pid)));
    }
    outboxes.accept(event(&socket, "gone", deleted(2)));
    listener.wait_for(&[1, 1, 2, 2, 3, 3, 0]).await;
    listener.stop().await;
    // No event waits: the connection's end alone shows that there may be new clients.
    let listener = Listener::listen(&socket);
    until(|| listener.pids().len() == 2).await;
    outboxes.accept(event(&socket, "late", deleted(3)));
    until(|| listener.pids().len() == 4).await;
    assert_eq!(listener.pids(), [1, 3, 0, 1]);
}

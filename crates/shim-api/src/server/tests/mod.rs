//! The server with handlers that misbehave, over real sockets.

mod damage;

use std::io;
use std::os::unix::net::UnixStream as Blocking;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use protobuf::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;
use ttrpc::{Code, Request, Response, Status};

use super::*;
use crate::frame::{self, HEADER, Header};

/// Does what the method's name says.
#[derive(Default)]
struct Misbehaving {
    abandoned: Arc<AtomicUsize>,
    noticed: Arc<Notify>,
}

/// Counts futures that were dropped before their end.
struct Guard(Arc<AtomicUsize>, Arc<Notify>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
        self.1.notify_one();
    }
}

#[async_trait]
impl Handler for Misbehaving {
    async fn call(&self, call: Call) -> Result<Vec<u8>, Status> {
        match call.method.as_str() {
            "panic" => panic!("as asked"),
            "hang" => {
                let _guard = Guard(Arc::clone(&self.abandoned), Arc::clone(&self.noticed));
                std::future::pending().await
            }
            "huge" => Ok(vec![0; 5 << 20]),
            _ => Ok(call.payload),
        }
    }
}

fn serve(handler: Misbehaving) -> UnixStream {
    let (ours, theirs) = Blocking::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let server = Server::new(handler);
    server.admit(UnixStream::from_std(ours).unwrap());
    UnixStream::from_std(theirs).unwrap()
}

async fn send(client: &mut UnixStream, stream: u32, method: &str, timeout_nano: i64) {
    let request = Request {
        method: method.into(),
        payload: method.into(),
        timeout_nano,
        ..Request::default()
    };
    let frame = frame::request(stream, &request).unwrap();
    client.write_all(&frame).await.unwrap();
}

async fn answer(client: &mut UnixStream) -> io::Result<(u32, Response)> {
    let mut header = [0; HEADER];
    client.read_exact(&mut header).await?;
    let header = Header::decode(header);
    let mut payload = vec![0; usize::try_from(header.length).unwrap()];
    client.read_exact(&mut payload).await?;
    Ok((header.stream, Response::parse_from_bytes(&payload)?))
}

#[tokio::test]
async fn a_panic_is_one_internal_error_and_the_connection_goes_on() {
    let mut client = serve(Misbehaving::default());
    send(&mut client, 1, "panic", 0).await;
    let (stream, response) = answer(&mut client).await.unwrap();
    assert_eq!((stream, response.status().code()), (1, Code::INTERNAL));
    send(&mut client, 3, "echo", 0).await;
    let (stream, response) = answer(&mut client).await.unwrap();
    assert_eq!(
        (stream, response.payload.as_slice()),
        (3, b"echo".as_slice())
    );
}

#[tokio::test]
async fn a_deadline_is_kept_and_other_calls_do_not_wait() {
    let mut client = serve(Misbehaving::default());
    send(&mut client, 1, "hang", 0).await;
    send(&mut client, 3, "hang", 20_000_000).await;
    send(&mut client, 5, "huge", 0).await;
    let mut answers = Vec::new();
    for _ in 0..2 {
        let (stream, response) = answer(&mut client).await.unwrap();
        answers.push((stream, response.status().code()));
    }
    answers.sort_unstable_by_key(|(stream, _)| *stream);
    assert_eq!(
        answers,
        [(3, Code::DEADLINE_EXCEEDED), (5, Code::RESOURCE_EXHAUSTED)]
    );
}

#[tokio::test]
async fn who_leaves_is_not_waited_for() {
    let handler = Misbehaving::default();
    let (abandoned, noticed) = (Arc::clone(&handler.abandoned), Arc::clone(&handler.noticed));
    let mut client = serve(handler);
    send(&mut client, 1, "hang", 0).await;
    send(&mut client, 3, "echo", 0).await;
    answer(&mut client).await.unwrap();
    drop(client);
    tokio::time::timeout(Duration::from_secs(10), noticed.notified())
        .await
        .unwrap();
    assert_eq!(abandoned.load(Ordering::SeqCst), 1);
}

/// A store that is this test: what is kept outlives the server.
#[derive(Debug, Default)]
struct Shelf(Mutex<Vec<(FdName, OwnedFd)>>);

impl FdStore for Shelf {
    fn keep(&self, name: &FdName, descriptors: &[std::os::fd::BorrowedFd<'_>]) -> io::Result<()> {
        for descriptor in descriptors {
            let kept = descriptor.try_clone_to_owned()?;
            self.0.lock().unwrap().push((*name, kept));
        }
        Ok(())
    }

    fn forget(&self, name: &FdName) -> io::Result<()> {
        self.0.lock().unwrap().retain(|(kept, _)| kept != name);
        Ok(())
    }
}

impl Shelf {
    fn connections(&self) -> Vec<(u64, OwnedFd, Option<OwnedFd>)> {
        let kept = self.0.lock().unwrap();
        let answer = |number| {
            let name = FdName::Answer(number);
            let mut stored = kept.iter().filter(|(stored, _)| *stored == name);
            Some(stored.next()?.1.try_clone().unwrap())
        };
        let connections = kept.iter().filter_map(|(name, descriptor)| match name {
            FdName::Connection(number) => {
                let descriptor = descriptor.try_clone().unwrap();
                Some((*number, descriptor, answer(*number)))
            }
            _ => None,
        });
        connections.collect()
    }
}

/// Answers what it is asked again, and nothing else: a daemon that is killed before it can.
struct Mortal;

#[async_trait]
impl Handler for Mortal {
    async fn call(&self, call: Call) -> Result<Vec<u8>, Status> {
        if !call.is_again && !["echo", "where", "parts", "numbers"].contains(&call.method.as_str())
        {
            std::future::pending::<()>().await;
        }
        match call.method.as_str() {
            "where" => match call.session.namespace.get() {
                Some(namespace) => Ok(namespace.as_str().into()),
                None => Err(ttrpc::get_status(Code::DATA_LOSS, "no namespace")),
            },
            "numbers" => Ok((0..700_000_u32).flat_map(u32::to_le_bytes).collect()),
            "gone" => Err(ttrpc::get_status(Code::NOT_FOUND, "gone")),
            _ => Ok(call.payload),
        }
    }
}

/// Runs `talk` against a server that is gone afterwards, without a farewell.
fn generation<T>(
    shelf: &Arc<Shelf>,
    directory: &std::path::Path,
    new: Option<UnixPair>,
    talk: impl AsyncFnOnce() -> T,
) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let talked = runtime.block_on(async {
        let keeping = Keeping {
            store: Arc::<Shelf>::clone(shelf),
            directory: directory.join("connections"),
        };
        let server = Server::keeping(Mortal, keeping).unwrap();
        server.resume(shelf.connections());
        if let Some(pair) = new {
            server.admit(take_over(pair.into()).unwrap());
        }
        talk().await
    });
    runtime.shutdown_background();
    talked
}

type UnixPair = Blocking;

fn client(of: &Blocking) -> UnixStream {
    take_over(of.try_clone().unwrap().into()).unwrap()
}

/// Waits until the other side has taken all that was sent.
async fn taken(directory: &std::path::Path, at_least: u64) {
    for _ in 0..500 {
        let size = |entry: std::fs::DirEntry| entry.metadata().map_or(0, |found| found.len());
        let entries = std::fs::read_dir(directory.join("connections")).unwrap();
        if entries.flatten().map(size).max().unwrap_or(0) >= at_least {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the journal does not grow");
}

#[test]
fn a_call_that_was_taken_is_answered_by_the_next_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let shelf = Arc::<Shelf>::default();
    let (ours, theirs) = Blocking::pair().unwrap();
    generation(&shelf, directory.path(), Some(theirs), async || {
        let mut client = client(&ours);
        send(&mut client, 1, "wait", 60_000_000_000).await;
        send(&mut client, 3, "echo", 0).await;
        assert_eq!(answer(&mut client).await.unwrap().0, 3);
        send(&mut client, 5, "kill", 0).await;
        // The header, and entries for three requests and one answer.
        taken(directory.path(), 384 + 190).await;
    });
    generation(&shelf, directory.path(), None, async || {
        let mut client = client(&ours);
        send(&mut client, 7, "echo", 0).await;
        let mut streams = Vec::new();
        for _ in 0..3 {
            let (stream, response) = answer(&mut client).await.unwrap();
            assert_eq!(response.status().code(), Code::OK);
            streams.push(stream);
        }
        streams.sort_unstable();
        assert_eq!(streams, [1, 5, 7]);
    });
    // Nothing is owed, so nothing is answered twice.
    generation(&shelf, directory.path(), None, async || {
        let mut client = client(&ours);
        send(&mut client, 9, "echo", 0).await;
        assert_eq!(answer(&mut client).await.unwrap().0, 9);
    });
}

/// Longer than what a socket holds, and in pieces that end anywhere.
#[test]
fn a_frame_in_pieces_is_put_together_by_several_daemons() {
    let directory = tempfile::tempdir().unwrap();
    let shelf = Arc::<Shelf>::default();
    let (ours, theirs) = Blocking::pair().unwrap();
    let request = Request {
        method: "echo".into(),
        payload: (0..300_000_u32).flat_map(u32::to_le_bytes).collect(),
        ..Request::default()
    };
    let frame = frame::request(1, &request).unwrap();
    let mut theirs = Some(theirs);
    let mut sent = 0;
    for end in [3, 10, 11, 70_000, 500_000, 1_000_000] {
        generation(&shelf, directory.path(), theirs.take(), async || {
            client(&ours).write_all(&frame[sent..end]).await.unwrap();
            let noted = u64::try_from(end).unwrap() + 384;
            taken(directory.path(), noted).await;
        });
        sent = end;
    }
    let answered = generation(&shelf, directory.path(), None, async || {
        let mut client = client(&ours);
        client.write_all(&frame[sent..]).await.unwrap();
        answer(&mut client).await.unwrap()
    });
    assert_eq!(answered.0, 1);
    assert_eq!(answered.1.payload, request.payload);
}

/// Bytes that were looked at and noted, but not taken, are there twice: in the journal and in the socket.
#[test]
fn what_was_noted_and_not_taken_counts_once() {
    let directory = tempfile::tempdir().unwrap();
    let shelf = Arc::<Shelf>::default();
    let (ours, theirs) = Blocking::pair().unwrap();
    let journals = Journals::open(directory.path().join("connections")).unwrap();
    let request = Request {
        method: "kill".into(),
        ..Request::default()
    };
    let bytes = frame::request(1, &request).unwrap();
    journals.begin(4).request(1, &bytes);
    // Noted when it was whole, so it is there, and not taken.
    io::Write::write_all(&mut &ours, &bytes).unwrap();
    shelf
        .keep(&FdName::Connection(4), &[theirs.as_fd()])
        .unwrap();
    generation(&shelf, directory.path(), None, async || {
        let mut client = client(&ours);
        assert_eq!(answer(&mut client).await.unwrap().0, 1);
        send(&mut client, 3, "echo", 0).await;
        // Nothing in between: the first call was not made again.
        assert_eq!(answer(&mut client).await.unwrap().0, 3);
    });
}

/// A daemon is killed while its client has read a part of a long answer, again and again.
#[test]
fn an_answer_that_is_half_sent_arrives_once_and_whole() {
    let directory = tempfile::tempdir().unwrap();
    let shelf = Arc::<Shelf>::default();
    let (ours, theirs) = Blocking::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut theirs = Some(theirs);
    let mut received = Vec::new();
    let whole = frame::response(1, Ok((0..700_000_u32).flat_map(u32::to_le_bytes).collect()));
    for part in [0, 1, 9, 100_000, 700_000, 1_500_000] {
        generation(&shelf, directory.path(), theirs.take(), async || {
            let mut client = client(&ours);
            if received.is_empty() && part == 0 {
                send(&mut client, 1, "numbers", 0).await;
            }
            let mut bytes = vec![0; part];
            client.read_exact(&mut bytes).await.unwrap();
            received.extend(bytes);
            // As much as the socket takes.
            for _ in 0..20 {
                tokio::task::yield_now().await;
            }
        });
    }
    generation(&shelf, directory.path(), None, async || {
        let mut client = client(&ours);
        let mut bytes = vec![0; whole.len() - received.len()];
        client.read_exact(&mut bytes).await.unwrap();
        received.extend(bytes);
        assert!(received == whole, "other bytes");
        send(&mut client, 3, "echo", 0).await;
        assert_eq!(answer(&mut client).await.unwrap().0, 3);
    });
    let is_answer = |(name, _): &(FdName, OwnedFd)| matches!(name, FdName::Answer(_));
    assert!(
        !shelf.0.lock().unwrap().iter().any(is_answer),
        "it is still stored"
    );
}

/// The kernel has taken a part of an answer, and the daemon has died before it could note anything.
#[test]
fn what_the_kernel_took_of_an_answer_is_not_sent_again() {
    let directory = tempfile::tempdir().unwrap();
    let shelf = Arc::<Shelf>::default();
    let (ours, theirs) = Blocking::pair().unwrap();
    let journals = Journals::open(directory.path().join("connections")).unwrap();
    let request = Request {
        method: "numbers".into(),
        ..Request::default()
    };
    let bytes = frame::request(1, &request).unwrap();
    journals.begin(4).request(1, &bytes);
    let payload: Vec<u8> = (0..700_000_u32).flat_map(u32::to_le_bytes).collect();
    let frame = frame::response(1, Ok(payload.clone()));
    let answers = AnswerStore {
        store: Arc::<Shelf>::clone(&shelf),
        connection: 4,
    };
    drop(answers.store(&frame).unwrap());
    shelf
        .keep(&FdName::Connection(4), &[theirs.as_fd()])
        .unwrap();
    let (_, _, stored) = shelf.connections().remove(0);
    let sent = rustix::fs::sendfile(&theirs, stored.unwrap(), None, 50_000).unwrap();
    assert_eq!(sent, 50_000);
    generation(&shelf, directory.path(), None, async || {
        let mut client = client(&ours);
        let (stream, response) = answer(&mut client).await.unwrap();
        assert!(stream == 1 && response.payload == payload, "other bytes");
        send(&mut client, 3, "echo", 0).await;
        assert_eq!(answer(&mut client).await.unwrap().0, 3);
    });
}

#[test]
fn who_has_left_is_forgotten_by_all() {
    let directory = tempfile::tempdir().unwrap();
    let shelf = Arc::<Shelf>::default();
    let (ours, theirs) = Blocking::pair().unwrap();
    generation(&shelf, directory.path(), Some(theirs), async || {
        drop(ours);
        for _ in 0..500 {
            if shelf.connections().is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it is still kept");
    });
    let journals = std::fs::read_dir(directory.path().join("connections")).unwrap();
    assert_eq!(journals.count(), 0);
}

//! The server over real sockets: what its tests share.

mod conversation;
mod damage;
mod survival;

use std::fs::DirEntry;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as Blocking;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use embedshim_core::fdstore::{FdName, FdStore, InheritedFds, Intake, NoFdStore};
use protobuf::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use ttrpc::{Code, Request, Response, Status};

use super::answer::AnswerStore;
use super::handler::{Call, Handler};
use super::journal::{Identity, Journal, Journals};
use super::{ConnectionStorage, Server, nonblocking};
use crate::frame::{self, HEADER, Header};

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

/// A descriptor store that outlives the server.
#[derive(Debug, Default)]
struct Store(Mutex<Vec<(FdName, OwnedFd)>>);

impl FdStore for Store {
    fn add(&self, name: &FdName, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        for descriptor in descriptors {
            let kept = descriptor.try_clone_to_owned()?;
            self.0.lock().unwrap().push((*name, kept));
        }
        Ok(())
    }

    fn remove(&self, name: &FdName) -> io::Result<()> {
        self.0.lock().unwrap().retain(|(kept, _)| kept != name);
        Ok(())
    }
}

impl Store {
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

/// Answers replays, and few other calls: a daemon that is killed before it has answered them.
struct Mortal;

#[async_trait]
impl Handler for Mortal {
    async fn call(&self, call: Call) -> Result<Vec<u8>, Status> {
        if !call.is_replay && !["echo", "where", "parts", "numbers"].contains(&call.method.as_str())
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

/// Runs `talk` against a server that is killed afterwards.
fn generation<T>(
    store: &Arc<Store>,
    directory: &Path,
    new: Option<Blocking>,
    talk: impl AsyncFnOnce() -> T,
) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let talked = runtime.block_on(async {
        let storage = ConnectionStorage {
            store: Arc::<Store>::clone(store),
            intake: Intake::open(&mut InheritedFds::default(), &NoFdStore).unwrap(),
            journals: directory.join("connections"),
        };
        let server = Server::durable(Mortal, storage).unwrap();
        server.resume(store.connections()).await;
        if let Some(pair) = new {
            let stored = server.stored.as_ref().unwrap();
            let number = stored.numbers.draw();
            let admitted = server.store_and_admit(stored, number, pair.into());
            admitted.await.unwrap();
        }
        talk().await
    });
    runtime.shutdown_background();
    talked
}

fn client(of: &Blocking) -> UnixStream {
    nonblocking(of.try_clone().unwrap().into()).unwrap()
}

/// Waits until a journal has so many bytes.
async fn noted(directory: &Path, at_least: u64) {
    for _ in 0..500 {
        let size = |entry: DirEntry| entry.metadata().map_or(0, |found| found.len());
        let entries = std::fs::read_dir(directory.join("connections")).unwrap();
        if entries.flatten().map(size).max().unwrap_or(0) >= at_least {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the journal does not grow");
}

//! [`Connection`]: a shim as containerd speaks to it, without containerd. One socket, no thread:
//! what is measured is the shim. Answers may come in any order.

mod events;
mod frame;

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use protobuf::Message;
use ttrpc::proto::{KeyValue, Request, Response};

pub(crate) use events::EventSink;
use frame::{Frame, REQUEST, RESPONSE};

/// How long an answer may take.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);
/// What containerd calls the namespace among a request's metadata.
const NAMESPACE: &str = "containerd-namespace-ttrpc";

/// Which of the two names of the Task service; their messages are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    V2,
    V3,
}

impl Version {
    fn service(self) -> &'static str {
        match self {
            Self::V2 => "containerd.task.v2.Task",
            Self::V3 => "containerd.task.v3.Task",
        }
    }
}

/// A connection to a shim.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    version: Version,
    namespace: String,
    /// Clients' streams have odd numbers.
    next: u32,
    early: BTreeMap<u32, Vec<u8>>,
}

/// A request that was sent, and whose answer is awaited.
#[derive(Debug)]
pub(crate) struct Pending<R> {
    stream: u32,
    answer: PhantomData<R>,
}

impl Connection {
    pub(crate) fn open(path: &Path, version: Version, namespace: &str) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| path.display().to_string())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self {
            stream,
            version,
            namespace: namespace.into(),
            next: 1,
            early: BTreeMap::new(),
        })
    }

    /// Changes how long an answer may take.
    pub(crate) fn set_patience(&self, patience: Duration) -> anyhow::Result<()> {
        Ok(self.stream.set_read_timeout(Some(patience))?)
    }

    /// Sends a request, and waits for its answer.
    pub(crate) fn call<R: Message>(
        &mut self,
        method: &str,
        request: &impl Message,
    ) -> anyhow::Result<R> {
        let pending = self.send(method, request)?;
        self.receive(&pending).with_context(|| method.to_owned())
    }

    /// Sends a request.
    pub(crate) fn send<R: Message>(
        &mut self,
        method: &str,
        request: &impl Message,
    ) -> anyhow::Result<Pending<R>> {
        let request = Request {
            service: self.version.service().into(),
            method: method.into(),
            payload: request.write_to_bytes()?,
            metadata: vec![KeyValue {
                key: NAMESPACE.into(),
                value: self.namespace.clone(),
                ..KeyValue::default()
            }],
            ..Request::default()
        };
        let stream = self.next;
        self.next += 2;
        let frame = Frame {
            stream,
            kind: REQUEST,
            payload: request.write_to_bytes()?,
        };
        frame
            .write(&mut self.stream)
            .with_context(|| method.to_owned())?;
        Ok(Pending {
            stream,
            answer: PhantomData,
        })
    }

    /// Waits for an answer; those to other requests are kept meanwhile.
    pub(crate) fn receive<R: Message>(&mut self, pending: &Pending<R>) -> anyhow::Result<R> {
        loop {
            if let Some(payload) = self.early.remove(&pending.stream) {
                return answer(&payload);
            }
            let frame = Frame::read(&mut self.stream).context("no answer")?;
            let frame = frame.context("the shim closed the connection")?;
            if frame.kind != RESPONSE {
                bail!("a frame of kind {} is no answer", frame.kind);
            }
            self.early.insert(frame.stream, frame.payload);
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn answer<R: Message>(payload: &[u8]) -> anyhow::Result<R> {
    let response = Response::parse_from_bytes(payload)?;
    let status = response.status.into_option().unwrap_or_default();
    if status.code.value() != 0 {
        bail!("code {}: {}", status.code.value(), status.message);
    }
    Ok(R::parse_from_bytes(&response.payload)?)
}

/// Waits for one answer on each connection, and tells when each came, in the order of coming.
pub(crate) fn collect<R: Message>(
    awaited: Vec<(&mut Connection, Pending<R>)>,
) -> anyhow::Result<Vec<(Instant, R)>> {
    let mut awaited: Vec<_> = awaited.into_iter().map(Some).collect();
    let mut left = awaited.len();
    let mut answers = Vec::with_capacity(left);
    let deadline = Instant::now() + PATIENCE;
    while left > 0 {
        if Instant::now() > deadline {
            bail!("{left} answers do not come");
        }
        for index in readable(&awaited)? {
            let taken = awaited.get_mut(index).and_then(Option::take);
            let (connection, pending) = taken.ok_or_else(|| anyhow!("no such connection"))?;
            let answer = connection.receive(&pending)?;
            answers.push((Instant::now(), answer));
            left -= 1;
        }
    }
    Ok(answers)
}

/// Which of those that are still awaited have something to read.
fn readable<R>(awaited: &[Option<(&mut Connection, Pending<R>)>]) -> anyhow::Result<Vec<usize>> {
    let mut indices = Vec::new();
    let mut polled = Vec::new();
    for (index, one) in awaited.iter().enumerate() {
        if let Some((connection, _)) = one {
            indices.push(index);
            polled.push(PollFd::new(connection.as_fd(), PollFlags::POLLIN));
        }
    }
    poll(&mut polled, PollTimeout::from(1000_u16))?;
    let ready = indices.into_iter().zip(&polled);
    let ready = ready.filter(|(_, polled)| polled.any().unwrap_or(false));
    Ok(ready.map(|(index, _)| index).collect())
}

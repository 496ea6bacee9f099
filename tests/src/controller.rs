//! [`Controller`]: our sandbox controller as containerd, or something that is not containerd,
//! speaks to it. Messages are bytes, so that they can be wrong.

use std::path::Path;

use anyhow::Context;
use bytes::{Buf, BufMut};
use testbed::sandbox::PATIENCE;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

const SERVICE: &str = "/containerd.services.sandbox.v1.Controller/";

/// A connection to the controller of a sandbox's daemon.
#[derive(Debug)]
pub struct Controller {
    runtime: Runtime,
    channel: Channel,
    namespace: String,
    waits: JoinSet<Result<(), Status>>,
}

impl Controller {
    /// Connects, for pods of the CRI's namespace.
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        Self::connect_as(socket, "k8s.io")
    }

    /// The same for another namespace. A connection that is lost is made again by the next call.
    pub fn connect_as(socket: &Path, namespace: &str) -> anyhow::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display()))?;
        let endpoint = endpoint.connect_timeout(PATIENCE);
        let channel = runtime
            .block_on(endpoint.connect())
            .context("cannot connect to the sandbox controller")?;
        Ok(Self {
            runtime,
            channel,
            namespace: namespace.into(),
            waits: JoinSet::new(),
        })
    }

    /// Starts a sandbox, which changes nothing of one that is started, and returns the answer.
    pub fn start(&mut self, id: &str) -> anyhow::Result<Vec<u8>> {
        Ok(self.ask("Start", id)?)
    }

    /// A call with nothing but a sandbox's id, and its answer.
    pub fn ask(&mut self, method: &str, id: &str) -> Result<Vec<u8>, Status> {
        let call = self.call(method, field(1, id.as_bytes()));
        self.runtime.block_on(call)
    }

    fn call(
        &self,
        method: &str,
        message: Vec<u8>,
    ) -> impl Future<Output = Result<Vec<u8>, Status>> + Send + use<> {
        let (channel, namespace) = (self.channel.clone(), self.namespace.clone());
        call(channel, namespace, method.to_owned(), message)
    }

    /// Begins so many waits for the end of a pod, and returns when all of them are on their way.
    pub fn begin_waits(&mut self, id: &str, count: usize) -> anyhow::Result<()> {
        for _ in 0..count {
            let wait = self.call("Wait", field(1, id.as_bytes()));
            let wait = async move { wait.await.map(drop) };
            self.waits.spawn_on(wait, self.runtime.handle());
        }
        // Behind them on the same connection.
        self.ask("Status", id)?;
        Ok(())
    }

    /// Waits for the answers.
    pub fn finish_waits(&mut self) -> anyhow::Result<()> {
        let waits = &mut self.waits;
        let all = async {
            while let Some(wait) = waits.join_next().await {
                wait??;
            }
            anyhow::Ok(())
        };
        let limit = async { tokio::time::timeout(PATIENCE, all).await };
        self.runtime.block_on(limit)?
    }

    /// Creates a sandbox with these options; returns why it was refused.
    pub fn create(&mut self, id: &str, kind: &str, options: &[u8]) -> Option<Code> {
        let any = [field(1, kind.as_bytes()), field(2, options)].concat();
        let message = [field(1, id.as_bytes()), field(3, &any)].concat();
        let create = self.call("Create", message);
        let created = self.runtime.block_on(create);
        created.err().map(|status| status.code())
    }

    /// Creates a sandbox with the node's network, whose containers share their processes or not.
    pub fn create_plain(&mut self, id: &str, shares_processes: bool) -> Option<Code> {
        self.create_named(id, id, shares_processes)
    }

    /// The same for a pod of this name.
    pub fn create_named(&mut self, id: &str, name: &str, shares_processes: bool) -> Option<Code> {
        let metadata = [field(1, name.as_bytes()), field(2, name.as_bytes())].concat();
        // The node's network; a pid namespace for each container.
        let mut namespaces = vec![1 << 3, 2];
        if !shares_processes {
            namespaces.extend([2 << 3, 1]);
        }
        let linux = field(2, &field(1, &namespaces));
        let config = [field(1, &metadata), field(8, &linux)].concat();
        self.create(id, "runtime.v1.PodSandboxConfig", &config)
    }
}

async fn call(
    channel: Channel,
    namespace: String,
    method: String,
    message: Vec<u8>,
) -> Result<Vec<u8>, Status> {
    let mut client = Grpc::new(channel);
    let ready = client.ready().await;
    ready.map_err(|error| Status::unavailable(error.to_string()))?;
    let mut request = Request::new(message);
    let namespace = MetadataValue::try_from(namespace);
    let namespace = namespace.map_err(|_| Status::internal("no namespace"))?;
    request
        .metadata_mut()
        .insert("containerd-namespace", namespace);
    let path = format!("{SERVICE}{method}").parse();
    let path = path.map_err(|_| Status::internal("no path"))?;
    let answer = client.unary(request, path, Bytes).await?;
    Ok(answer.into_inner())
}

/// A field of bytes in a protobuf message.
fn field(number: u8, value: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2];
    let mut length = value.len();
    loop {
        let low = u8::try_from(length & 0x7f).unwrap_or(0);
        length >>= 7;
        if length == 0 {
            field.push(low);
            break;
        }
        field.push(low | 0x80);
    }
    field.extend(value);
    field
}

/// Messages as they are.
#[derive(Clone, Copy, Debug)]
struct Bytes;

impl Codec for Bytes {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Bytes {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Bytes {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut bytes = vec![0; buffer.remaining()];
        buffer.copy_to_slice(&mut bytes);
        Ok(Some(bytes))
    }
}

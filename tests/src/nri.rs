//! [`NriPlugin`]: a plugin of containerd's Node Resource Interface, as device and topology plugins
//! are: it hears of pods and containers, and adds a variable to the environment of each container.
//! Owns the connection, on which containerd's calls and the plugin's go at the same time.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, ensure};
use prost::Message;
use protobuf::Message as _;
use shim_api::frame::{self, HEADER, Header, Kind};
use testbed::sandbox::until;

/// containerd's calls of the plugin, and the plugin's of containerd.
const OF_PLUGIN: u32 = 1;
const OF_RUNTIME: u32 = 2;
/// What is before each piece on the connection: whose it is, and its length.
const PIECE: usize = 8;
/// More than a call of containerd's has here.
const LONGEST: usize = 1 << 20;
/// The name of the variable; its value is the name of the pod.
pub const VARIABLE: &str = "OF_POD";
/// The events that it wants, by the numbers of the API, with the words that a test has for them.
const EVENTS: [(i32, &str); 6] = [
    (1, "run pod"),
    (2, "stop pod"),
    (3, "remove pod"),
    (4, "create"),
    (6, "start"),
    (10, "stop"),
];
/// The calls for some of them.
const CALLS: [(&str, i32); 4] = [
    ("RunPodSandbox", 1),
    ("StopPodSandbox", 2),
    ("RemovePodSandbox", 3),
    ("StartContainer", 6),
];
const CREATE: i32 = 4;
const STOP: i32 = 10;

#[derive(Clone, PartialEq, Message)]
struct Register {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    index: String,
}

#[derive(Clone, PartialEq, Message)]
struct Configured {
    #[prost(int32, tag = "2")]
    events: i32,
}

/// A pod or a container.
#[derive(Clone, PartialEq, Message)]
struct Named {
    #[prost(string, tag = "1")]
    id: String,
    /// Of a pod.
    #[prost(string, tag = "2")]
    name: String,
    /// Of a container.
    #[prost(string, tag = "3")]
    container: String,
}

/// The request of a call about a container; its pod is the first field, the container the second.
#[derive(Clone, PartialEq, Message)]
struct OfContainer {
    #[prost(message, optional, tag = "1")]
    pod: Option<Named>,
    #[prost(message, optional, tag = "2")]
    container: Option<Named>,
}

#[derive(Clone, PartialEq, Message)]
struct StateChange {
    #[prost(int32, tag = "1")]
    event: i32,
    #[prost(message, optional, tag = "2")]
    pod: Option<Named>,
    #[prost(message, optional, tag = "3")]
    container: Option<Named>,
}

#[derive(Clone, PartialEq, Message)]
struct Created {
    #[prost(message, optional, tag = "1")]
    adjustment: Option<Adjustment>,
}

#[derive(Clone, PartialEq, Message)]
struct Adjustment {
    #[prost(message, repeated, tag = "4")]
    environment: Vec<Variable>,
}

#[derive(Clone, PartialEq, Message)]
struct Variable {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    value: String,
}

/// A plugin, until it is dropped.
#[derive(Debug)]
pub struct NriPlugin {
    stream: UnixStream,
    heard: Arc<Mutex<Vec<String>>>,
}

impl NriPlugin {
    /// Connects to containerd and registers.
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        until("containerd listens to plugins", || Ok(socket.exists()))?;
        let stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
        let heard = Arc::new(Mutex::default());
        let mut call = ttrpc::Request::new();
        call.service = "nri.pkg.api.v1alpha1.Runtime".into();
        call.method = "RegisterPlugin".into();
        let request = Register {
            name: "embedshim-test".into(),
            index: "00".into(),
        };
        call.payload = request.encode_to_vec();
        let frame = frame::request(1, &call).context("too long")?;
        send(&stream, OF_RUNTIME, &frame)?;
        let serving = Serving {
            stream: stream.try_clone()?,
            heard: Arc::clone(&heard),
        };
        thread::spawn(move || {
            let result = serving.run();
            let mut heard = serving.heard.lock().unwrap_or_else(PoisonError::into_inner);
            heard.push(format!("the end: {result:?}"));
        });
        let plugin = Self { stream, heard };
        plugin.hears("synchronized")?;
        Ok(plugin)
    }

    /// Waits until it has heard this.
    pub fn hears(&self, what: &str) -> anyhow::Result<()> {
        let heard = || self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        until(what, || Ok(heard().iter().any(|line| line == what)))
            .with_context(|| format!("the plugin has heard {:?}", heard()))
    }
}

impl Drop for NriPlugin {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

fn send(mut stream: &UnixStream, whose: u32, frame: &[u8]) -> anyhow::Result<()> {
    let length = u32::try_from(frame.len())?;
    let piece = [&whose.to_be_bytes(), &length.to_be_bytes(), frame].concat();
    Ok(stream.write_all(&piece)?)
}

struct Serving {
    stream: UnixStream,
    heard: Arc<Mutex<Vec<String>>>,
}

impl Serving {
    /// Answers until the connection ends.
    fn run(&self) -> anyhow::Result<()> {
        let mut calls = Vec::new();
        loop {
            let mut piece = [0; PIECE];
            (&self.stream).read_exact(&mut piece)?;
            let [w0, w1, w2, w3, l0, l1, l2, l3] = piece;
            let length = usize::try_from(u32::from_be_bytes([l0, l1, l2, l3]))?;
            ensure!(length <= LONGEST, "a piece of {length} bytes");
            let mut bytes = vec![0; length];
            (&self.stream).read_exact(&mut bytes)?;
            if u32::from_be_bytes([w0, w1, w2, w3]) == OF_PLUGIN {
                calls.extend(bytes);
                while let Some(call) = take(&mut calls)? {
                    self.answer(&call)?;
                }
            }
        }
    }

    fn answer(&self, (header, call): &(Header, ttrpc::Request)) -> anyhow::Result<()> {
        ensure!(header.kind == Kind::Request, "{header:?}");
        let answer = match call.method.as_str() {
            "Configure" => {
                let events = EVENTS.iter().map(|(event, _)| 1 << (event - 1)).sum();
                Configured { events }.encode_to_vec()
            }
            "Synchronize" | "Shutdown" => Vec::new(),
            "CreateContainer" => {
                let request = OfContainer::decode(call.payload.as_slice())?;
                self.hear(CREATE, request.pod.as_ref(), request.container.as_ref());
                let variable = Variable {
                    name: VARIABLE.to_owned(),
                    value: request.pod.unwrap_or_default().name,
                };
                let adjustment = Some(Adjustment {
                    environment: vec![variable],
                });
                Created { adjustment }.encode_to_vec()
            }
            "StopContainer" => {
                let request = OfContainer::decode(call.payload.as_slice())?;
                self.hear(STOP, request.pod.as_ref(), request.container.as_ref());
                Vec::new()
            }
            "StateChange" => {
                let change = StateChange::decode(call.payload.as_slice())?;
                self.hear(change.event, change.pod.as_ref(), change.container.as_ref());
                Vec::new()
            }
            // From 2.3 on, what was a change of state is a call of its own, with the same fields.
            method => {
                let event = CALLS.iter().find(|(name, _)| *name == method);
                let (_, event) = event.with_context(|| format!("containerd calls {method}"))?;
                let request = OfContainer::decode(call.payload.as_slice())?;
                self.hear(*event, request.pod.as_ref(), request.container.as_ref());
                Vec::new()
            }
        };
        send(
            &self.stream,
            OF_PLUGIN,
            &frame::response(header.stream, Ok(answer)),
        )?;
        if call.method == "Synchronize" {
            self.note("synchronized".into());
        }
        Ok(())
    }

    /// `create c of pod`, `run pod pod`.
    fn hear(&self, event: i32, pod: Option<&Named>, container: Option<&Named>) {
        let known = EVENTS.iter().find(|(number, _)| *number == event);
        let event = known.map_or("another event", |(_, name)| name);
        let pod = pod.map(|pod| pod.name.as_str()).unwrap_or_default();
        self.note(match container {
            Some(container) => format!("{event} {} of {pod}", container.container),
            None => format!("{event} {pod}"),
        });
    }

    fn note(&self, line: String) {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.push(line);
    }
}

/// The first call that is there as a whole.
fn take(bytes: &mut Vec<u8>) -> anyhow::Result<Option<(Header, ttrpc::Request)>> {
    let Some(header) = bytes.first_chunk().copied().map(Header::decode) else {
        return Ok(None);
    };
    let end = HEADER + usize::try_from(header.length)?;
    ensure!(end <= LONGEST, "a call of {end} bytes");
    let Some(payload) = bytes.get(HEADER..end) else {
        return Ok(None);
    };
    let call = ttrpc::Request::parse_from_bytes(payload)?;
    bytes.drain(..end);
    Ok(Some((header, call)))
}

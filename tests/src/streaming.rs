//! [`Streaming`]: the streams of a CRI exec or attach, as kubectl has them: one WebSocket, a
//! channel number before each piece.

use std::net::TcpStream;

use anyhow::{Context, bail};
use testbed::sandbox::PATIENCE;
use tungstenite::client::IntoClientRequest;
use tungstenite::{Message, WebSocket, client};

const PROTOCOL: &str = "v4.channel.k8s.io";
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
/// How it ended, as JSON.
const STATUS: u8 = 3;
const RESIZE: u8 = 4;

/// The streams of one process.
#[derive(Debug)]
pub struct Streaming {
    socket: WebSocket<TcpStream>,
    /// What it has printed so far.
    pub stdout: String,
    /// What it has complained of so far.
    pub stderr: String,
    status: Option<String>,
}

impl Streaming {
    /// Opens what `Exec` or `Attach` answered: `http://address:port/exec/token`.
    pub(crate) fn open(url: &str) -> anyhow::Result<Self> {
        let place = url.strip_prefix("http://").context("no http address")?;
        let address = place.split('/').next().unwrap_or_default();
        let stream = TcpStream::connect(address).with_context(|| url.to_owned())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut request = format!("ws://{place}").into_client_request()?;
        let headers = request.headers_mut();
        headers.insert("Sec-WebSocket-Protocol", PROTOCOL.parse()?);
        let (socket, _) = client(request, stream).context("no WebSocket")?;
        Ok(Self {
            socket,
            stdout: String::new(),
            stderr: String::new(),
            status: None,
        })
    }

    fn send(&mut self, channel: u8, bytes: &[u8]) -> anyhow::Result<()> {
        let message = [&[channel], bytes].concat();
        Ok(self.socket.send(Message::binary(message))?)
    }

    /// Types something.
    pub fn write(&mut self, text: &str) -> anyhow::Result<()> {
        self.send(STDIN, text.as_bytes())
    }

    /// Resizes the terminal.
    pub fn resize(&mut self, width: u16, height: u16) -> anyhow::Result<()> {
        let size = format!("{{\"Width\":{width},\"Height\":{height}}}");
        self.send(RESIZE, size.as_bytes())
    }

    /// Reads until `text` was printed.
    pub fn wait_for(&mut self, text: &str) -> anyhow::Result<()> {
        while !self.stdout.contains(text) {
            if !self.receive()? {
                bail!("it ended after {:?}", self.stdout);
            }
        }
        Ok(())
    }

    /// Reads to the end, which is a status in JSON, or nothing.
    pub fn finish(&mut self) -> anyhow::Result<String> {
        while self.receive()? {}
        Ok(self.status.clone().unwrap_or_default())
    }

    fn receive(&mut self) -> anyhow::Result<bool> {
        let message = match self.socket.read() {
            Ok(message) => message,
            Err(tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed) => {
                return Ok(false);
            }
            Err(tungstenite::Error::Protocol(_)) if self.status.is_some() => return Ok(false),
            Err(error) => return Err(error).context(self.stdout.clone()),
        };
        if let Message::Binary(bytes) = message
            && let Some((channel, text)) = bytes.split_first()
        {
            let text = String::from_utf8_lossy(text);
            match *channel {
                STDOUT => self.stdout.push_str(&text),
                STDERR => self.stderr.push_str(&text),
                STATUS => self.status = Some(text.into_owned()),
                _ => {}
            }
        }
        Ok(true)
    }
}

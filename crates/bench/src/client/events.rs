//! [`EventSink`]: where shims send their events, in containerd's place. Answers each, so that none
//! is sent again; keeps none.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::Context;

use super::frame::{Frame, RESPONSE};

/// A listener that takes events until the process ends.
#[derive(Debug)]
pub(crate) struct EventSink {
    path: PathBuf,
}

impl EventSink {
    /// Listens at a path.
    pub(crate) fn listen(path: PathBuf) -> anyhow::Result<Self> {
        let listener = UnixListener::bind(&path).with_context(|| path.display().to_string())?;
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                // A shim that goes away ends its thread.
                thread::spawn(move || acknowledge(connection));
            }
        });
        Ok(Self { path })
    }

    /// Where it listens.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

fn acknowledge(mut connection: UnixStream) -> io::Result<()> {
    while let Some(event) = Frame::read(&mut connection)? {
        let answer = Frame {
            stream: event.stream,
            kind: RESPONSE,
            // An empty answer, without an error: both of its fields have their defaults.
            payload: Vec::new(),
        };
        answer.write(&mut connection)?;
    }
    Ok(())
}

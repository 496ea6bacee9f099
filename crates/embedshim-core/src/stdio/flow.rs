//! [`Flow`]: one direction of one stream, from its first byte to its end, as its owner has it. Owns
//! what the owner and the flow tell each other; when bytes are moved is [`super::run`]'s.

use std::sync::Arc;

use super::flow_state::{AtEnd, FlowPath, FlowState, remove_unread};
use super::idle::Idle;
use super::pump::Way;
use super::run::Run;
use crate::clock::BootTime;
use crate::fdstore::ProcessFds;

/// One direction of one stream. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Flow {
    pub(super) stream: &'static str,
    way: Way,
    at_end: AtEnd,
    shared: Arc<FlowState>,
    idle: Idle,
    number: u64,
}

impl Flow {
    /// Begins to move bytes. Needs a tokio runtime.
    pub(super) fn start(path: FlowPath, fds: ProcessFds, idle: &Idle) -> Self {
        let (way, at_end, stream) = (path.way, path.at_end, path.label.stream);
        let shared = Arc::<FlowState>::default();
        let number = idle.number();
        Run::start(path, fds, Arc::clone(&shared), idle, number);
        Self {
            stream,
            way,
            at_end,
            shared,
            idle: idle.clone(),
            number,
        }
    }

    /// Its process has ended.
    pub(super) fn process_ended(&self) {
        self.shared.process_ended();
        self.kick();
    }

    /// Its process's exit is published: what its client has not read now, it may never read.
    pub(super) fn exit_is_published(&self, fds: &ProcessFds) {
        self.shared.exit_is_published();
        if self.at_end == AtEnd::KeepUntilPublished {
            remove_unread(fds, self.way);
        }
    }

    /// Its descriptors have changed.
    pub(super) fn kick(&self) {
        // In this order, for one that is about to rest.
        self.shared.changed.notify_one();
        if let Some(run) = self.idle.take(self.number) {
            self.idle.wake(run);
        }
    }

    /// Waits until everything is moved and the sink is closed.
    pub(super) async fn done(&self) {
        let done = self.shared.done.notified();
        if !self.shared.is_done() {
            done.await;
        }
    }

    /// Since when its sink has taken nothing of what there is.
    pub(super) fn blocked_since(&self) -> Option<BootTime> {
        self.shared.blocked_since()
    }

    /// What it goes through, and how much it has moved.
    pub(super) fn meter(&self) -> Meter {
        Meter {
            way: self.way,
            shared: Arc::clone(&self.shared),
        }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.shared.stop();
        drop(self.idle.take(self.number));
    }
}

/// How far a flow has come. It outlives the flow.
#[derive(Clone, Debug)]
pub(super) struct Meter {
    pub(super) way: Way,
    shared: Arc<FlowState>,
}

impl Meter {
    /// Bytes that this daemon has moved to the sink.
    pub(super) fn moved(&self) -> u64 {
        self.shared.moved()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{self, Read, Write};

    use nix::fcntl::OFlag;
    use nix::unistd::pipe2;
    use tokio::runtime::Handle;

    use super::*;
    use crate::fdstore::{FdRole, NoFdStore, StreamFd};
    use crate::stdio::append::Label;
    use crate::stdio::open;
    use crate::stdio::pump::fill;
    use std::time::Duration;

    const OUTPUT: Way = Way {
        source: &[FdRole::StdoutPipe],
        stage: Some(FdRole::StdoutStage),
        sink: Some(FdRole::StdoutClient),
    };

    /// A flow between two pipes: its set, the writer of its source, and the reader of its sink.
    fn flow(idle: &Idle) -> (Flow, ProcessFds, File, File) {
        let flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let ((from, writer), (reader, to)) = (pipe2(flags).unwrap(), pipe2(flags).unwrap());
        let fds = ProcessFds::new(Arc::new(NoFdStore), 1);
        let ends = [
            (FdRole::StdoutPipe, from),
            (FdRole::StdoutStage, open::stage().unwrap()),
            (FdRole::StdoutClient, to),
        ];
        fds.insert(ends.map(|(role, fd)| (role, StreamFd::new(fd))))
            .unwrap();
        let path = FlowPath {
            way: OUTPUT,
            patience: None,
            at_end: AtEnd::Close,
            label: Label {
                id: "c".into(),
                stream: "stdout",
            },
        };
        let flow = Flow::start(path, fds.clone(), idle);
        (flow, fds, writer.into(), reader.into())
    }

    fn alive() -> usize {
        Handle::current().metrics().num_alive_tasks()
    }

    async fn until(mut is_so: impl FnMut() -> bool) {
        let wait = async {
            while !is_so() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), wait)
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn an_idle_stream_is_no_task_and_what_comes_later_arrives() {
        let idle = Idle::new().unwrap();
        tokio::spawn(idle.clone().serve());
        let none = alive();
        let (flow, _fds, writer, mut reader) = flow(&idle);
        assert_eq!(alive(), none);
        for text in [b"one", b"two"] {
            fill(&writer, text);
            let mut got = Vec::new();
            until(|| {
                let _ = reader.read_to_end(&mut got);
                got == text
            })
            .await;
            until(|| alive() == none).await;
        }
        drop(writer);
        flow.done().await;
        // It is closed in a thread of its own.
        until(|| reader.read(&mut [0]).is_ok_and(|count| count == 0)).await;
    }

    #[tokio::test]
    async fn a_stream_is_blocked_for_as_long_as_its_sink_takes_nothing() {
        let idle = Idle::new().unwrap();
        tokio::spawn(idle.clone().serve());
        let (flow, _fds, writer, mut reader) = flow(&idle);
        assert_eq!(flow.blocked_since(), None);
        let much = vec![7; 1024 * 1024];
        let mut left = much.len();
        let is_stuck = |since: Option<BootTime>| {
            since.is_some_and(|since| BootTime::now().since(since) > Duration::from_millis(50))
        };
        until(|| {
            left -= (&writer).write(&much[..left]).unwrap_or(0);
            left > 0 && is_stuck(flow.blocked_since())
        })
        .await;
        drop(writer);
        let mut read = 0;
        let mut buffer = vec![0; 64 * 1024];
        until(|| {
            read += reader.read(&mut buffer).unwrap_or(0);
            read == much.len() - left && flow.blocked_since().is_none()
        })
        .await;
    }

    #[tokio::test]
    async fn a_stream_that_rests_hears_that_its_descriptors_have_changed() {
        let idle = Idle::new().unwrap();
        // Nothing is served: what wakes it is the kick.
        let (flow, _fds, _writer, _reader) = flow(&idle);
        let before = alive();
        flow.kick();
        assert_eq!(alive(), before + 1);
        until(|| alive() == before).await;
    }

    #[tokio::test]
    async fn a_dropped_stream_rests_no_more_and_keeps_its_ends() {
        let idle = Idle::new().unwrap();
        let (flow, _fds, writer, mut reader) = flow(&idle);
        let number = flow.number;
        drop(flow);
        assert!(idle.take(number).is_none());
        fill(&writer, b"waits");
        let error = reader.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}

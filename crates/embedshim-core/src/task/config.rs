//! [`NodeConfig`]: how a [`Node`](super::Node) works. Owns the defaults.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::event::EventSink;
use crate::fdstore::{FdStore, NoFdStore};
use crate::observer::Observer;

/// How a [`Node`](super::Node) works.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Where its records are: a directory of its own, on tmpfs, owned by us alone.
    pub state_dir: PathBuf,
    /// The longest that one call of the OCI runtime, with its hooks, may take.
    pub runtime_deadline: Duration,
    /// Reap every child of this process that nothing in it waits for, as a child subreaper must:
    /// with a container come processes that outlive their parents. It cannot know what else in this
    /// process waits for children, so it is only for a program that has one node and starts no
    /// other children. Without it only children that are watched are reaped.
    pub reap_orphans: bool,
    /// Holds descriptors that have to outlive this process: terminals, both ends of streams. With
    /// [`NoFdStore`], an init's output goes on when the next node finds its pipes; terminals,
    /// inputs and the outputs of execs end with this process.
    pub descriptors: Arc<dyn FdStore>,
    /// Where events go; without a sink, [`Node::next_event`](super::Node::next_event) has them.
    pub events: Option<Arc<dyn EventSink>>,
    /// Hears of exits and of calls of the runtime, to count them.
    pub observer: Option<Arc<dyn Observer>>,
}

impl NodeConfig {
    /// A node without an fd store, that reaps watched children only and whose runtime has five
    /// minutes for a call.
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        Self {
            state_dir: state_dir.into(),
            runtime_deadline: Duration::from_mins(5),
            reap_orphans: false,
            descriptors: Arc::new(NoFdStore),
            events: None,
            observer: None,
        }
    }
}

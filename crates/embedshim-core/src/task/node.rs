//! [`Node`]: the tasks of one machine and every operation on them.

use std::path::Path;

use crate::cgroup::Metrics;
use crate::error::Error;
use crate::event::Event;
use crate::id::{ProcessKey, TaskKey};

use super::request::{
    Cleaned, CreateTask, Deleted, ExecProcess, Exit, ProcessEntry, ProcessSnapshot,
};

/// The tasks of one machine.
///
/// Mutations run in tasks of their own: dropping the returned future abandons the answer, never the work.
/// Reads answer from the last published state and never wait for the OCI runtime.
#[derive(Clone, Debug)]
pub struct Node {}

impl Node {
    /// Mounts the rootfs, runs `runc create`, watches the init. Returns its pid.
    pub async fn create(&self, _request: CreateTask) -> Result<u32, Error> {
        todo!()
    }
    /// Starts the init or an exec. Returns its pid.
    pub async fn start(&self, _key: &ProcessKey) -> Result<u32, Error> {
        todo!()
    }
    /// Declares an exec.
    pub async fn exec(&self, _request: ExecProcess) -> Result<(), Error> {
        todo!()
    }
    /// Deletes a stopped (or never started) process; with the init, the whole task.
    pub async fn delete(&self, _key: &ProcessKey) -> Result<Deleted, Error> {
        todo!()
    }
    /// Sends a signal to one process, or with `all` to all of the container.
    pub async fn kill(&self, _key: &ProcessKey, _signal: u32, _all: bool) -> Result<(), Error> {
        todo!()
    }
    /// Freezes the container.
    pub async fn pause(&self, _key: &TaskKey) -> Result<(), Error> {
        todo!()
    }
    /// Thaws it.
    pub async fn resume(&self, _key: &TaskKey) -> Result<(), Error> {
        todo!()
    }
    /// Changes resources; `resources` is an OCI `LinuxResources` as JSON.
    pub async fn update(&self, _key: &TaskKey, _resources: Vec<u8>) -> Result<(), Error> {
        todo!()
    }
    /// Closes our end of a process's standard input: it sees the end once the client's ends are closed too.
    pub async fn close_stdin(&self, _key: &ProcessKey) -> Result<(), Error> {
        todo!()
    }
    /// Resizes the terminal, if there is one.
    pub async fn resize_pty(
        &self,
        _key: &ProcessKey,
        _width: u16,
        _height: u16,
    ) -> Result<(), Error> {
        todo!()
    }
    /// Waits for the end.
    pub async fn wait(&self, _key: &ProcessKey) -> Result<Exit, Error> {
        todo!()
    }
    /// The process at this moment.
    pub fn state(&self, _key: &ProcessKey) -> Result<ProcessSnapshot, Error> {
        todo!()
    }
    /// The init's pid, 0 for a task there is not.
    pub fn init_pid(&self, _key: &TaskKey) -> u32 {
        todo!()
    }
    /// The container's processes. Never empty for a task there is: containerd 1.7 takes that for a leak.
    pub async fn pids(&self, _key: &TaskKey) -> Result<Vec<ProcessEntry>, Error> {
        todo!()
    }
    /// The cgroup's counters; of a stopped task, the last ones read.
    pub async fn stats(&self, _key: &TaskKey) -> Result<Metrics, Error> {
        todo!()
    }
    /// containerd has given this bundle up: kill what lives, remove everything. Joins a cleanup under way.
    pub async fn cleanup(&self, _key: &TaskKey, _bundle: &Path) -> Result<Cleaned, Error> {
        todo!()
    }
    /// The next event, in order. One consumer.
    pub async fn next_event(&self) -> Option<Event> {
        todo!()
    }
}

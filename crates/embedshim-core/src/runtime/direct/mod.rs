//! What runc does for an ordinary container in `start` and `delete`, done without a process of
//! runc. Owns when that is possible, and that a container is left as runc would leave it at each
//! step (invariant 23); whatever is odd is runc's to do, and its words are the client's.

mod delete;
mod known;
mod start;
mod state;
mod sys;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::process::Command;

use super::failure::Failure;
use super::{Input, Runtime};
use crate::blocking::blocking;
use crate::error::Error;
use crate::process::{Process, ProcessIdentity};
use crate::program::find;
use known::{ProgramId, Verdict};
use start::Started;

/// How long a program may take to tell its version, and how much longer than its deadline a thread
/// may take that works without it.
const ASK: Duration = Duration::from_secs(10);

/// What a look at the runtime's program has led to.
enum Looked<T, W> {
    Done(T),
    Other,
    /// It is to be asked for its version before the work can be done.
    Ask(PathBuf, ProgramId, W),
}

impl Runtime {
    /// Lets the init go on without the runtime; false if that is the runtime's to do.
    pub(super) async fn start_directly(
        &self,
        id: &str,
        init: Arc<Process>,
        log: &Path,
    ) -> Result<bool, Error> {
        let (directory, limit, of) = (self.state_of(id), self.deadline, id.to_owned());
        let start = move |program| start::start(&directory, &of, &init, program, limit);
        let message = match self.directly(log, start).await {
            Ok(Some(Started::Yes)) => return Ok(true),
            Ok(None | Some(Started::AskRunc)) => return Ok(false),
            Ok(Some(Started::Unclear(message))) => message,
            Err(error) => error.to_string(),
        };
        let operation = "start";
        Err(Error::RuntimeKilled { operation, message })
    }

    /// Waits until no start is in flight that a predecessor has begun without the runtime.
    pub(crate) async fn wait_for_start(&self, id: &str) {
        let (directory, limit) = (self.state_of(id), self.deadline);
        // At the limit the runtime says what is.
        let _ = self
            .in_time(move || start::wait_until_over(&directory, limit))
            .await;
    }

    /// Removes what is left of a container without the runtime, whose init and all else have ended;
    /// false if that is the runtime's to do, or if it has to say what is wrong.
    pub(super) async fn delete_directly(
        &self,
        id: &str,
        init: ProcessIdentity,
        log: &Path,
    ) -> bool {
        if self.systemd_cgroup {
            return false;
        }
        let (directory, of) = (self.state_of(id), id.to_owned());
        let delete = move |_| delete::delete(&directory, &of, init);
        matches!(self.directly(log, delete).await, Ok(Some(true)))
    }

    /// Does `work` in a thread that may block, if the runtime's program is a known runc; `None` if
    /// it is not. `work` keeps to the deadline; an error says that it has not.
    async fn directly<T: Send + 'static>(
        &self,
        log: &Path,
        work: impl FnOnce(ProgramId) -> T + Send + 'static,
    ) -> Result<Option<T>, Error> {
        let (binary, context) = (OsString::from(&self.binary), self.context.clone());
        let look = move || {
            let program = find(&binary, context.variable("PATH"));
            let program = program.filter(|program| program.is_absolute());
            match program.map_or(Verdict::Other, |program| known::judge(&program)) {
                Verdict::Known(program) => Looked::Done(work(program)),
                Verdict::Other => Looked::Other,
                Verdict::Ask(path, program) => Looked::Ask(path, program, work),
            }
        };
        let (path, program, work) = match self.in_time(look).await? {
            Looked::Done(done) => return Ok(Some(done)),
            Looked::Other => return Ok(None),
            Looked::Ask(path, program, work) => (path, program, work),
        };
        let is_known = self.is_version_known(&path, log).await;
        known::note(program, is_known);
        if is_known != Some(true) {
            return Ok(None);
        }
        self.in_time(move || work(program)).await.map(Some)
    }

    async fn in_time<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let done = tokio::time::timeout(self.deadline.saturating_add(ASK), blocking(work));
        done.await.map_err(|_late| Error::Deadline {
            what: "the OCI runtime's files and cgroups",
            seconds: self.deadline.as_secs(),
        })?
    }

    /// Asks a program for its version; `None` if it could not be asked.
    async fn is_version_known(&self, program: &Path, log: &Path) -> Option<bool> {
        let asking = Self {
            deadline: self.deadline.min(ASK),
            ..self.clone()
        };
        let mut command = Command::new(program);
        command.arg("--version");
        match asking.call("--version", command, Input::Null, log).await {
            Ok(told) => Some(known::is_version_known(&told)),
            Err(Failure::NotRun(_)) => None,
            Err(Failure::Late | Failure::Exited { .. }) => Some(false),
        }
    }
}

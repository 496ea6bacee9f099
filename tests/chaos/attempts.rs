//! Requests whose runtime may be killed. Such a request is refused, and then nothing of it is done,
//! or it is done; it is asked again until it is. Owns what must be true in between; a refusal
//! without a killed runtime is a failure.

use std::fs;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use containerd_shim_protos::api;
use nix::sys::signal::Signal;
use testbed::sandbox::until;

use crate::client::{Answer, EXEC, Pending, accepted, refused};
use crate::direct::{Container, NO_TASK};
use crate::streams::ClientStreams;

/// Who kills the runtime of one request so often has nothing else to do.
const MANY: u32 = 50;
const FINISHED: &str = "process already finished";

impl Container<'_> {
    /// Asks once. None is a refusal in these words of a request whose runtime was killed meanwhile.
    pub(crate) fn attempt<T>(
        &self,
        exec: &str,
        words: &[&str],
        ask: impl FnOnce() -> anyhow::Result<Answer<T>>,
    ) -> anyhow::Result<Option<T>> {
        let exec = (!exec.is_empty()).then(|| exec.to_owned());
        let process = (self.id.to_owned(), exec);
        let before = self.ledger().runtimes_killed(&process);
        match ask()? {
            Ok(answer) => Ok(Some(answer)),
            Err(told) if self.ledger().runtimes_killed(&process) > before => {
                let is_due = words.iter().any(|words| told.contains(words));
                ensure!(is_due, "refused with {told:?} instead of {words:?}");
                self.ledger().count(|counts| counts.refused += 1);
                Ok(None)
            }
            Err(told) => bail!("refused: {told}"),
        }
    }

    /// Asks until it is done, and looks after each refusal.
    fn persist<T>(
        &self,
        words: &str,
        ask: impl Fn() -> anyhow::Result<Answer<T>>,
        look: impl Fn() -> anyhow::Result<()>,
    ) -> anyhow::Result<T> {
        for _ in 0..MANY {
            if let Some(answer) = self.attempt("", &[words], &ask)? {
                return Ok(answer);
            }
            look().context("after a refusal")?;
        }
        bail!("refused {MANY} times")
    }

    /// Creates it. After a refusal nothing of it is there.
    pub(crate) fn create(&mut self) -> anyhow::Result<()> {
        self.pid = self.create_from(None).context("Create")?;
        ensure!(self.pid > 0, "Create tells no pid");
        self.expect_status("", api::Status::CREATED).map(drop)
    }

    /// The same from a checkpoint, with the pid that is told.
    pub(crate) fn create_from(&mut self, checkpoint: Option<&Path>) -> anyhow::Result<u32> {
        let words = ["OCI runtime create failed"];
        for _ in 0..MANY {
            let ask = || {
                self.client
                    .create_from(&self.bundle, &self.streams, checkpoint)
            };
            if let Some(pid) = self.attempt("", &words, ask)? {
                return Ok(pid);
            }
            refused("State", NO_TASK, self.client.state(""))?;
            self.ground.check_gone(self.id)?;
            self.streams.check_nothing_came_of_refused()?;
            self.open_streams_again()?;
        }
        bail!("refused {MANY} times")
    }

    /// The streams of the next container of this name.
    pub(crate) fn open_streams_again(&mut self) -> anyhow::Result<()> {
        self.attempts += 1;
        let plan = self.life.init;
        let plan = if self.pid > 0 {
            plan.without_lines()
        } else {
            plan
        };
        self.streams = ClientStreams::open_again(self.ground, self.id, self.attempts, &plan)?;
        Ok(())
    }

    /// Starts it. After a refusal it is as it was: its program does not run. Or it has ended
    /// without having run, by the runtime's own code, which then is never let go on: None.
    pub(crate) fn start(&self, words: &str) -> anyhow::Result<Option<u32>> {
        for _ in 0..MANY {
            let ask = || self.client.start("");
            if let Some(pid) = self.attempt("", &[words], ask).context("Start")? {
                return Ok(Some(pid));
            }
            if !self.waits_for_start()? {
                return Ok(None);
            }
        }
        bail!("Start is refused {MANY} times")
    }

    fn waits_for_start(&self) -> anyhow::Result<bool> {
        let state = match self.client.state("")? {
            Ok(state) => state,
            Err(told) => bail!("State is refused: {told}"),
        };
        let line = fs::read_to_string(format!("/proc/{}/cmdline", state.pid)).unwrap_or_default();
        match state.status.enum_value_or_default() {
            api::Status::CREATED if state.pid == 0 || line.starts_with("runc\0init") => Ok(true),
            // It has just ended.
            api::Status::CREATED if line.is_empty() => Ok(false),
            api::Status::STOPPED => Ok(false),
            status => bail!("after a refused start it is {status:?}: {line:?}"),
        }
    }

    /// Its init has ended without having been started: with the code of the runtime's own failure.
    pub(crate) fn end_unstarted(
        &self,
        wait: Option<Pending<api::WaitResponse>>,
    ) -> anyhow::Result<()> {
        let wait = wait.unwrap_or_else(|| self.client.wait(""));
        let code = accepted("Wait", wait.answer())?.exit_status;
        self.ledger().code(self.id, "Wait", code, &[1]);
        let told = self.delete()?;
        self.ledger().code(self.id, "Delete", told, &[code]);
        self.streams.check_no_line_came()?;
        self.gone()
    }

    /// Deletes it. After a refusal it is there, and can be deleted.
    pub(crate) fn delete(&self) -> anyhow::Result<u32> {
        let ask = || self.client.delete("");
        let look = || self.expect_status("", api::Status::STOPPED).map(drop);
        self.persist("OCI runtime delete failed", ask, look)
            .context("Delete")
    }

    /// Freezes and thaws it. After a refusal it is what it was.
    pub(crate) fn pause(&self) -> anyhow::Result<()> {
        self.persist(
            "OCI runtime pause failed",
            || self.freeze(),
            || self.runs_on(),
        )
        .context("Pause")?;
        self.expect_status("", api::Status::PAUSED)?;
        let is_frozen = || {
            self.expect_status("", api::Status::PAUSED)?;
            ensure!(self.is_frozen()?, "it is told to be paused and is not");
            Ok(())
        };
        self.persist(
            "OCI runtime resume failed",
            || self.client.resume(),
            is_frozen,
        )
        .context("Resume")?;
        self.runs_on()
    }

    /// runc gives up on a cgroup of version 1 that does not freeze soon, as on a busy machine (seed
    /// 1670187), and thaws it: that is asked again.
    fn freeze(&self) -> anyhow::Result<Answer<api::Empty>> {
        let mut answer = self.client.pause()?;
        for _ in 0..MANY {
            match &answer {
                Err(told) if told.contains("unable to freeze") => {
                    self.runs_on()?;
                    answer = self.client.pause()?;
                }
                _ => break,
            }
        }
        Ok(answer)
    }

    /// It is told to run, and does.
    pub(crate) fn runs_on(&self) -> anyhow::Result<()> {
        self.expect_status("", api::Status::RUNNING)?;
        ensure!(!self.is_frozen()?, "it is told to run and is frozen");
        Ok(())
    }

    fn is_frozen(&self) -> anyhow::Result<bool> {
        let root = Path::new("/sys/fs/cgroup");
        let cgroup = Path::new(&self.ground.namespace).join(self.id);
        let first = root.join("freezer").join(&cgroup).join("freezer.state");
        if first.exists() {
            return Ok(fs::read_to_string(first)?.trim() != "THAWED");
        }
        let second = root.join(cgroup).join("cgroup.freeze");
        Ok(fs::read_to_string(second)?.trim() == "1")
    }

    /// Kills all its processes.
    pub(crate) fn kill_all(&self) -> anyhow::Result<()> {
        for _ in 0..MANY {
            let ask = || match self.client.kill_all(Signal::SIGKILL)? {
                // The one before may have been sent.
                Err(told) if told.contains(FINISHED) => Ok(Ok(api::Empty::new())),
                answer => Ok(answer),
            };
            let killed = self.attempt("", &["unknown error after kill"], ask);
            if killed.context("Kill all")?.is_some() {
                return Ok(());
            }
        }
        bail!("Kill all is refused {MANY} times")
    }

    /// No process of this exec runs, or will.
    pub(crate) fn check_not_running(&self, exec: &str) -> anyhow::Result<()> {
        let mark = format!("{EXEC}={exec}\0");
        let mut found = Vec::new();
        let gone = until("nothing of a refused exec runs", || {
            let pids = match self.client.pids()? {
                Ok(pids) => pids,
                Err(told) => bail!("Pids is refused: {told}"),
            };
            let is_its = |pid: &u32| {
                let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                String::from_utf8_lossy(&environment).contains(&mark)
            };
            found = pids.into_iter().filter(is_its).collect();
            Ok(found.is_empty())
        });
        let describe = |pid: &u32| {
            let file = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}"));
            let [command, stat, wchan] = ["cmdline", "stat", "wchan"].map(file);
            let commands = command.map(|words| words.replace('\0', " "));
            format!("{pid} {commands:?} {stat:?} {wchan:?}")
        };
        gone.with_context(|| {
            let all: Vec<String> = found.iter().map(describe).collect();
            format!("{exec}: {all:?}")
        })
    }
}

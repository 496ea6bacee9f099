//! Execs over ttrpc: one after the other, several at once, and those that end with their container.
//! Owns what is compared of an exec: its codes, its answers, its streams.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context, bail, ensure};
use containerd_shim_protos::api;
use nix::sys::signal::Signal;

use crate::client::{Pending, accepted, refused};
use crate::direct::{Container, handles_term};
use crate::plan::{End, ProcessPlan};
use crate::program::Program;
use crate::streams::ClientStreams;

const NO_EXEC: &str = "process does not exist";

/// An exec that ends with its container.
#[derive(Debug)]
pub(crate) struct Lingering<'a> {
    exec: String,
    plan: ProcessPlan,
    streams: ClientStreams<'a>,
    /// Answered when its container ends. The mutex is there because several threads borrow a
    /// container, for [`Container::probes`].
    wait: Mutex<Option<Pending<api::WaitResponse>>>,
    code: u32,
}

impl Container<'_> {
    fn next_exec(&mut self) -> String {
        self.execs += 1;
        self.ledger().count(|counts| counts.execs += 1);
        format!("e{}", self.execs)
    }

    /// Does all that is planned of an exec.
    pub(crate) fn exec(&mut self, plan: &ProcessPlan) -> anyhow::Result<()> {
        let exec = self.next_exec();
        let streams = ClientStreams::open(self.ground, self.id, &exec, plan)?;
        accepted("Exec", self.client.exec(&exec, plan, &streams))?;
        if plan.program == Program::Missing {
            if let Some(pid) = self.start_missing(&exec)? {
                bail!("Start tells {pid} of a program that is not there");
            }
            accepted("Delete", self.client.delete(&exec))?;
            streams.check_nothing_came_of_refused()?;
            return refused("State", NO_EXEC, self.client.state(&exec));
        }
        let early = plan.waits_early.then(|| self.client.wait(&exec));
        let Some(pid) = self.start_exec(&exec)? else {
            return self.refused_exec(&exec, &streams, early);
        };
        ensure!(pid > 0, "Start of {exec} tells no pid");
        let wait = early.unwrap_or_else(|| self.client.wait(&exec));
        streams.await_lines()?;
        match plan.end {
            End::Term => {
                handles_term(pid)?;
                accepted("Kill", self.client.kill(&exec, Signal::SIGTERM))?;
            }
            End::Kill => drop(accepted("Kill", self.client.kill(&exec, Signal::SIGKILL))?),
            End::CloseIo => {
                streams.feed()?;
                accepted("CloseIO", self.client.close_stdin(&exec))?;
            }
            End::WithInit => {
                self.lingering.push(Lingering {
                    exec,
                    plan: *plan,
                    streams,
                    wait: Mutex::new(Some(wait)),
                    code: 0,
                });
                return Ok(());
            }
            _ => {}
        }
        self.finish_exec(&exec, plan, &streams, wait)
    }

    /// Starts an exec whose program is not there: None, in runc-v2's words.
    fn start_missing(&self, exec: &str) -> anyhow::Result<Option<u32>> {
        let ask = || match self.client.start(exec)? {
            Err(told) if told.contains("OCI runtime exec failed") => Ok(Ok(None)),
            answer => Ok(answer.map(Some)),
        };
        let started = self.attempt(exec, &["may have run"], ask)?;
        Ok(started.flatten())
    }

    /// Starts an exec; None if that is refused because its runtime was killed.
    fn start_exec(&self, exec: &str) -> anyhow::Result<Option<u32>> {
        let words = ["OCI runtime exec failed", "may have run"];
        self.attempt(exec, &words, || self.client.start(exec))
            .context("Start of an exec")
    }

    /// An exec whose start is refused does not run, and who waits for it is let go.
    fn refused_exec(
        &self,
        exec: &str,
        streams: &ClientStreams<'_>,
        early: Option<Pending<api::WaitResponse>>,
    ) -> anyhow::Result<()> {
        self.check_not_running(exec)?;
        let code = accepted(
            "Wait",
            early.unwrap_or_else(|| self.client.wait(exec)).answer(),
        )?
        .exit_status;
        ensure!(code == 0, "Wait tells {code} of what was not started");
        accepted("Delete", self.client.delete(exec))?;
        streams.check_nothing_came_of_refused()?;
        refused("State", NO_EXEC, self.client.state(exec))
    }

    fn finish_exec(
        &self,
        exec: &str,
        plan: &ProcessPlan,
        streams: &ClientStreams<'_>,
        wait: Pending<api::WaitResponse>,
    ) -> anyhow::Result<()> {
        let name = format!("{} {exec}", self.id);
        let code = accepted("Wait", wait.answer())?.exit_status;
        self.ledger().code(&name, "Wait", code, &plan.codes());
        self.ledger().ended(self.id, Some(exec.to_owned()), code);
        let state = self.expect_status(exec, api::Status::STOPPED)?;
        self.ledger()
            .code(&name, "State", state.exit_status, &[code]);
        self.kill_finds_no_process(exec)?;
        let told = accepted("Delete", self.client.delete(exec))?;
        self.ledger().code(&name, "Delete", told, &[code]);
        streams.check_deleted(code)?;
        refused("State", NO_EXEC, self.client.state(exec))
    }

    /// Several execs at once, on the one connection.
    pub(crate) fn probes(&mut self, count: u64, code: u32) -> anyhow::Result<()> {
        let execs: Vec<String> = (0..count).map(|_| self.next_exec()).collect();
        let program = Program::Exit { code, after_ms: 0 };
        let plan = ProcessPlan::plain(program, End::Itself);
        let this = &*self;
        let probe = |exec: &str| {
            let streams = ClientStreams::open(this.ground, this.id, exec, &plan)?;
            accepted("Exec", this.client.exec(exec, &plan, &streams))?;
            let wait = this.client.wait(exec);
            if this.start_exec(exec)?.is_none() {
                return this.refused_exec(exec, &streams, Some(wait));
            }
            this.finish_exec(exec, &plan, &streams, wait)
        };
        std::thread::scope(|scope| {
            let probes: Vec<_> = execs
                .iter()
                .map(|exec| scope.spawn(|| probe(exec)))
                .collect();
            let mut results = probes.into_iter().map(|probe| match probe.join() {
                Ok(result) => result,
                Err(_) => bail!("a probe panicked"),
            });
            results.try_for_each(|result| result)
        })
    }

    /// The container has ended: so have the execs that were still there.
    pub(crate) fn end_lingering(&mut self) -> anyhow::Result<()> {
        let mut lingering = std::mem::take(&mut self.lingering);
        for exec in &mut lingering {
            let wait = exec.wait.get_mut().unwrap_or_else(PoisonError::into_inner);
            let Some(wait) = wait.take() else { continue };
            exec.code = accepted("Wait", wait.answer())?.exit_status;
            let name = format!("{} {}", self.id, exec.exec);
            self.ledger()
                .code(&name, "Wait", exec.code, &exec.plan.codes());
            self.ledger()
                .ended(self.id, Some(exec.exec.clone()), exec.code);
        }
        self.lingering = lingering;
        Ok(())
    }

    /// The container is deleted, and these execs with it.
    pub(crate) fn check_lingering(&self) -> anyhow::Result<()> {
        let mut all = self.lingering.iter();
        all.try_for_each(|exec| exec.streams.check_deleted(exec.code))
    }
}

//! Lives over ttrpc: carries a [`Life`] out as containerd would, on a connection of its own, and
//! compares every answer with the one that is due (`docs/shim-contract.md`, "Task states"), and
//! what its streams bring with what was written. Nothing may show that a daemon died meanwhile.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use containerd_shim_protos::api;
use nix::sys::signal::Signal;
use testbed::sandbox::until;

use crate::bundle::{Joined, Made};
use crate::client::{Client, Pending, accepted, refused};
use crate::execs::Lingering;
use crate::ground::Ground;
use crate::ledger::Ledger;
use crate::plan::{End, Life, Step};
use crate::program::Program;
use crate::streams::ClientStreams;

pub(crate) const NO_TASK: &str = "container not created";
const FINISHED: &str = "process already finished";

/// Lives one life on a connection of its own.
pub(crate) fn live(ground: &Ground, id: &str, life: &Life) {
    live_on(ground, id, life, Client::connect(ground, id));
}

/// The same in a pod.
pub(crate) fn live_in(ground: &Ground, id: &str, life: &Life, pod: &Joined) {
    let client = Client::connect(ground, id);
    try_to_live(ground, id, life, client, Some(pod));
}

/// Lives one life on this connection. An error is a failure, and the end of the run: what is left
/// of the container is what one wants to look at.
pub(crate) fn live_on(ground: &Ground, id: &str, life: &Life, client: anyhow::Result<Client>) {
    try_to_live(ground, id, life, client, None);
}

fn try_to_live(
    ground: &Ground,
    id: &str,
    life: &Life,
    client: anyhow::Result<Client>,
    pod: Option<&Joined>,
) {
    ground.ledger.note(&format!("{id} {life:?}"));
    let lived = client
        .and_then(|client| Container::new(ground, id, life, client, pod))
        .and_then(|mut container| container.live());
    if let Err(error) = lived {
        ground.ledger.failure(&format!("{id}: {error:#}; {life:?}"));
    }
    ground.ledger.count(|counts| counts.lives += 1);
}

pub(crate) struct Container<'a> {
    pub(crate) ground: &'a Ground,
    pub(crate) id: &'a str,
    pub(crate) life: &'a Life,
    pub(crate) client: Client,
    pub(crate) bundle: Made,
    pub(crate) streams: ClientStreams<'a>,
    pub(crate) pid: u32,
    /// How often it was created, or was to be.
    pub(crate) attempts: u64,
    /// Execs that end with the container.
    pub(crate) lingering: Vec<Lingering<'a>>,
    pub(crate) execs: u64,
}

impl<'a> Container<'a> {
    pub(crate) fn new(
        ground: &'a Ground,
        id: &'a str,
        life: &'a Life,
        client: Client,
        pod: Option<&Joined>,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            ground,
            id,
            life,
            client,
            bundle: ground.bundles.make(id, life, pod)?,
            streams: ClientStreams::open(ground, id, "", &life.init)?,
            pid: 0,
            attempts: 0,
            lingering: Vec::new(),
            execs: 0,
        })
    }

    pub(crate) fn ledger(&self) -> &Ledger {
        &self.ground.ledger
    }

    fn live(&mut self) -> anyhow::Result<()> {
        if self.life.init.program == Program::Missing {
            let created = self.client.create(&self.bundle, &self.streams);
            refused("Create", "OCI runtime create failed", created)?;
            self.streams.check_nothing_came_of_refused()?;
            return self.gone();
        }
        self.create()?;
        if self.life.init.end == End::Unstarted {
            self.delete()?;
            self.streams.check_nothing_came()?;
            return self.gone();
        }
        let Some(mut wait) = self.begin()? else {
            return Ok(());
        };
        for step in &self.life.steps {
            self.take(step).with_context(|| format!("{step:?}"))?;
        }
        if self.life.is_checkpointed {
            match self.go_on_from_checkpoint(wait)? {
                Some(again) => wait = again,
                None => return self.gone(),
            }
        }
        self.finish(wait)
    }

    /// Starts it. The answer comes when it ends. None if it has ended unstarted, and is gone.
    pub(crate) fn begin(&mut self) -> anyhow::Result<Option<Pending<api::WaitResponse>>> {
        self.streams.write_early()?;
        let early = self.life.init.waits_early.then(|| self.client.wait(""));
        let Some(pid) = self.start("OCI runtime start failed")? else {
            self.end_unstarted(early)?;
            return Ok(None);
        };
        ensure!(
            pid == self.pid,
            "Start tells pid {pid} instead of {}",
            self.pid
        );
        let wait = early.unwrap_or_else(|| self.client.wait(""));
        self.streams.await_lines()?;
        Ok(Some(wait))
    }

    /// Brings it to its end and deletes it.
    pub(crate) fn finish(&mut self, wait: Pending<api::WaitResponse>) -> anyhow::Result<()> {
        let code = self.end(wait)?;
        self.after(code)?;
        self.streams.check_ended(code)?;
        let told = self.delete()?;
        self.ledger().code(self.id, "Delete", told, &[code]);
        self.streams.check_files(code)?;
        self.check_lingering()?;
        self.gone()
    }

    /// Brings the init to its end, as planned, and returns the code that is told of it.
    fn end(&mut self, wait: Pending<api::WaitResponse>) -> anyhow::Result<u32> {
        let due = self.life.init.codes();
        let mut due = due.as_slice();
        let own = [self.life.init.program.own_code()];
        match self.life.init.end {
            End::Term => {
                handles_term(self.pid)?;
                accepted("Kill", self.client.kill("", Signal::SIGTERM))?;
            }
            End::Kill => drop(accepted("Kill", self.client.kill("", Signal::SIGKILL))?),
            End::KillAll => self.kill_all()?,
            End::CloseIo => {
                self.streams.feed()?;
                accepted("CloseIO", self.client.close_stdin(""))?;
            }
            End::Race { after_ms } => {
                sleep(Duration::from_millis(after_ms));
                match self.client.kill("", Signal::SIGKILL)? {
                    Ok(_) => {}
                    // Then the signal had no effect, and the process has its own code.
                    Err(words) if words.contains(FINISHED) => due = &own,
                    Err(words) => bail!("Kill is refused: {words}"),
                }
            }
            End::Itself | End::WithInit | End::WithPod | End::Unstarted => {}
        }
        let told = accepted("Wait", wait.answer())?.exit_status;
        self.ledger().code(self.id, "Wait", told, due);
        self.ledger().ended(self.id, None, told);
        self.end_lingering()?;
        Ok(told)
    }

    /// What must be true of a container that has ended and is not deleted.
    fn after(&self, code: u32) -> anyhow::Result<()> {
        let state = self.expect_status("", api::Status::STOPPED)?;
        self.ledger()
            .code(self.id, "State", state.exit_status, &[code]);
        self.kill_finds_no_process("")?;
        let again = accepted("Wait", self.client.wait("").answer())?.exit_status;
        self.ledger().code(self.id, "Wait again", again, &[code]);
        // Else containerd deletes it at its next start, and the code is lost.
        let pids = accepted("Pids", self.client.pids())?;
        ensure!(!pids.is_empty(), "Pids of a stopped container are none");
        Ok(())
    }

    /// A signal to a process that has ended. A daemon that died under this request may have sent
    /// it before, as far as its successor knows: then, and only then, the answer may be success.
    pub(crate) fn kill_finds_no_process(&self, exec: &str) -> anyhow::Result<()> {
        let before = self.ground.daemons.current();
        match self.client.kill(exec, Signal::SIGKILL)? {
            Err(told) if told.contains(FINISHED) => Ok(()),
            Ok(_) if self.ground.daemons.current() != before => Ok(()),
            answer => bail!("Kill {exec}: {answer:?} instead of {FINISHED:?}"),
        }
    }

    /// What must be true after the end of it all.
    pub(crate) fn gone(&self) -> anyhow::Result<()> {
        refused("State", NO_TASK, self.client.state(""))?;
        refused("Delete", NO_TASK, self.client.delete(""))?;
        accepted("Shutdown", self.client.shutdown())?;
        self.ground.check_gone(self.id)?;
        self.ground.bundles.remove(self.id)
    }

    fn take(&mut self, step: &Step) -> anyhow::Result<()> {
        match *step {
            Step::Read => self.read(),
            Step::Pause => self.pause(),
            Step::Exec(ref exec) => self.exec(exec),
            Step::Probes { count, code } => self.probes(count, code),
            Step::CreateAgain => {
                let created = self.client.create(&self.bundle, &self.streams);
                refused("Create", "already exists", created)
            }
            Step::StartAgain => {
                let words = "cannot start a running process";
                refused("Start", words, self.client.start(""))
            }
            Step::DeleteEarly => refused(
                "Delete",
                "cannot delete a running process",
                self.client.delete(""),
            ),
            Step::Rest { ms } => {
                sleep(Duration::from_millis(ms));
                Ok(())
            }
        }
    }

    fn read(&self) -> anyhow::Result<()> {
        self.expect_status("", api::Status::RUNNING)?;
        let pids = accepted("Pids", self.client.pids())?;
        ensure!(pids.contains(&self.pid), "{} is not in {pids:?}", self.pid);
        ensure!(accepted("Stats", self.client.stats())?, "no statistics");
        let pid = accepted("Connect", self.client.connected_pid())?;
        ensure!(
            pid == self.pid,
            "Connect tells {pid} instead of {}",
            self.pid
        );
        Ok(())
    }

    pub(crate) fn expect_status(
        &self,
        exec: &str,
        due: api::Status,
    ) -> anyhow::Result<api::StateResponse> {
        let state = accepted("State", self.client.state(exec))?;
        let told = state.status.enum_value_or_default();
        ensure!(
            told == due,
            "State {exec} tells {told:?} instead of {due:?}"
        );
        Ok(state)
    }
}

/// Waits until a process ends with its own code at SIGTERM. Its name is looked at too: what is not
/// yet our guest is runc, which handles every signal there is.
pub(crate) fn handles_term(pid: u32) -> anyhow::Result<()> {
    until("it handles SIGTERM", || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let field = |name| status.lines().find_map(|line| line.strip_prefix(name));
        let caught = field("SigCgt:").and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        let is_guest = field("Name:").is_some_and(|name| name.trim() == "guest");
        Ok(is_guest && caught.is_some_and(|caught| caught & (1 << 14) != 0))
    })
}

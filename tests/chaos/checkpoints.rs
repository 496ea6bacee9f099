//! A container whose state is written to files by CRIU, and which goes on from them. Where there is
//! no CRIU, the refusal is runc-v2's.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use containerd_shim_protos::api;
use nix::sys::signal::Signal;

use crate::client::{Answer, Pending, accepted, refused};
use crate::direct::{Container, handles_term};
use crate::plan::End;
use crate::program::KILLED;

const FAILED: &str = "OCI runtime checkpoint failed";
const FINISHED: &str = "process already finished";

impl Container<'_> {
    /// Checkpoints it while it goes on, and to its end, and restores it. None if it has ended and
    /// is deleted.
    pub(crate) fn go_on_from_checkpoint(
        &mut self,
        wait: Pending<api::WaitResponse>,
    ) -> anyhow::Result<Option<Pending<api::WaitResponse>>> {
        if self.life.init.end == End::Term {
            // What it runs until then is a shell.
            handles_term(self.pid)?;
        }
        if !self.ground.has_criu {
            refused(
                "Checkpoint",
                FAILED,
                self.client.checkpoint(&self.image("none"), true),
            )?;
            self.runs_on()?;
            return Ok(Some(wait));
        }
        self.ledger().count(|counts| counts.checkpoints += 1);
        for number in 0_u32.. {
            let image = self.image(&format!("first-{number}"));
            let ask = || self.ask_for_checkpoint(&image, false);
            let saved = self.attempt("", &[FAILED], ask);
            if saved.context("Checkpoint")?.is_some() {
                break;
            }
            self.runs_on().context("after a refused checkpoint")?;
        }
        self.runs_on()?;
        let image = self.image("last");
        let ask = || self.ask_for_checkpoint(&image, true);
        let is_saved = self
            .attempt("", &[FAILED], ask)
            .context("Checkpoint")?
            .is_some();
        if !is_saved {
            // CRIU may go on without its runtime, and end the container.
            match self.client.kill("", Signal::SIGKILL)? {
                Err(told) if !told.contains(FINISHED) => bail!("Kill is refused: {told}"),
                _ => {}
            }
        }
        let code = accepted("Wait", wait.answer())?.exit_status;
        self.ledger().code(self.id, "Wait", code, &[KILLED]);
        self.ledger().ended(self.id, None, code);
        self.streams.check_ended(code)?;
        let told = self.delete()?;
        self.ledger().code(self.id, "Delete", told, &[code]);
        self.streams.check_files(code)?;
        if !is_saved {
            return Ok(None);
        }
        self.restore(&image).map(Some)
    }

    /// CRIU itself may fail on a machine as busy as this one, once: the container runs on then, and
    /// what it says of it is in the ledger.
    fn ask_for_checkpoint(&self, image: &Path, exit: bool) -> anyhow::Result<Answer<api::Empty>> {
        let answer = self.client.checkpoint(image, exit)?;
        let Err(told) = &answer else {
            return Ok(answer);
        };
        let log = self.bundle.path.join("criu-work/dump.log");
        let log = fs::read_to_string(log).unwrap_or_default();
        let errors: Vec<&str> = log.lines().filter(|line| line.contains("rror")).collect();
        let id = self.id;
        self.ledger()
            .note(&format!("{id} Checkpoint: {told}: {errors:?}"));
        if !told.contains("criu failed") || errors.is_empty() {
            return Ok(answer);
        }
        self.runs_on().context("after CRIU has failed")?;
        self.client.checkpoint(image, exit)
    }

    fn restore(&mut self, image: &Path) -> anyhow::Result<Pending<api::WaitResponse>> {
        self.open_streams_again()?;
        let pid = self
            .create_from(Some(image))
            .context("Create from a checkpoint")?;
        ensure!(pid == 0, "Create tells pid {pid} before the restore");
        self.expect_status("", api::Status::CREATED)?;
        let wait = self.client.wait("");
        let pid = self.start("OCI runtime restore failed")?;
        self.pid = pid.context("what was not restored has ended")?;
        ensure!(self.pid > 0, "Start tells no pid of what it has restored");
        self.runs_on()?;
        Ok(wait)
    }

    fn image(&self, name: &str) -> PathBuf {
        self.bundle.path.join("images").join(name)
    }
}

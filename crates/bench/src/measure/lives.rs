//! A container's life with one exec, phase by phase: launcher, Create, Start, exec, Kill, from
//! there to the answer of Wait, Delete, and what containerd does after it.

use std::process::Command;
use std::time::{Duration, Instant};

use super::Bench;
use crate::report::FLOOR;
use crate::subject::spawn::succeed;
use crate::subject::{Container, Ground, Subject};

/// The phases and how long each took; the launcher's own are known for shims only.
#[derive(Clone, Debug, Default)]
pub(super) struct Life {
    phases: Vec<(&'static str, Duration)>,
}

impl Life {
    pub(super) fn total(&self) -> Duration {
        self.phases.iter().map(|(_, took)| *took).sum()
    }

    /// How long a phase took.
    pub(super) fn took(&self, phase: &str) -> Duration {
        let its = self.phases.iter().filter(|(name, _)| *name == phase);
        its.map(|(_, took)| *took).sum()
    }

    fn phase<T>(
        &mut self,
        name: &'static str,
        work: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let began = Instant::now();
        let done = work()?;
        self.phases.push((name, began.elapsed()));
        Ok(done)
    }
}

/// Takes a container of a subject through a whole life, with an exec or without.
pub(super) fn live(
    ground: &Ground,
    subject: &Subject,
    id: &str,
    with_exec: bool,
) -> anyhow::Result<Life> {
    let mut life = Life::default();
    let bundle = ground.bundle(id)?;
    let mut container = life.phase("launch", || subject.launch(ground, id, bundle))?;
    life.phase("create", || container.create())?;
    life.phase("start", || container.start())?;
    if with_exec {
        life.phase("exec", || container.exec())?;
    }
    life.phase("kill", || container.kill())?;
    life.phase("wait after kill", || container.wait())?;
    life.phase("delete", || container.delete())?;
    let clean_up = || Container::clean_up(container);
    life.phase("clean-up", clean_up)?.remove()?;
    Ok(life)
}

pub(super) fn measure(bench: &mut Bench<'_>) -> anyhow::Result<()> {
    let rounds = bench.rounds(60, 20);
    for round in 0..rounds {
        if bench.is_late(round, 5) {
            break;
        }
        for subject in bench.in_turn(round) {
            let id = bench.id();
            let life = live(bench.ground, subject, &id, true)?;
            bench.time("life", None, subject.name(), life.total());
            for (phase, took) in &life.phases {
                // A bare runtime has none.
                if subject.shim().is_some() || !["launch", "clean-up"].contains(phase) {
                    bench.time(&format!("life/{phase}"), None, subject.name(), *took);
                }
            }
        }
        launchers(bench, round)?;
    }
    Ok(())
}

/// The launcher alone. What it can be compared with is a static program that does nothing.
fn launchers(bench: &mut Bench<'_>, round: u32) -> anyhow::Result<()> {
    for subject in bench.in_turn(round) {
        let Some(shim) = subject.shim() else {
            continue;
        };
        let id = bench.id();
        let bundle = bench.ground.bundle(&id)?;
        let launcher = shim.launcher(bench.ground, &id, &bundle);
        let began = Instant::now();
        let _address = launcher.start()?;
        bench.time("launcher/start", None, shim.name(), began.elapsed());
        let mut container = shim.launch(bench.ground, &id, bundle)?;
        container.create(|_| {})?;
        container.start()?;
        container.kill()?;
        container.wait()?;
        container.delete()?;
        let began = Instant::now();
        launcher.delete()?;
        bench.time("launcher/delete", None, shim.name(), began.elapsed());
        container.clean_up()?.remove()?;
    }
    let nothing = bench.ground.directory().join("rootfs/bin/true");
    let began = Instant::now();
    succeed(&mut Command::new(nothing))?;
    let took = began.elapsed();
    for name in ["launcher/start", "launcher/delete"] {
        bench.time(name, None, FLOOR, took);
    }
    Ok(())
}

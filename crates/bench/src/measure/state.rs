//! State of an idle shim, and 200 containers that end at once (50 in a quick run).

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Bench;
use crate::client::collect;
use crate::subject::{Container, ShimContainer, Subject};

const EXITS: usize = 200;
/// Of a quick run.
const FEWER_EXITS: usize = 50;
/// Between two questions.
const PAUSE: Duration = Duration::from_millis(2);

pub(super) fn idle(bench: &mut Bench<'_>) -> anyhow::Result<()> {
    let questions = if bench.is_short() { 50 } else { 200 };
    for round in 0..bench.rounds(5, 3).min(10) {
        if bench.is_late(round, 1) {
            break;
        }
        for subject in bench.in_turn(round) {
            if subject.shim().is_none() {
                continue;
            }
            let mut container = bench.running(subject)?;
            if let Container::Shim(asked) = &mut container {
                asked.state()?;
                for _ in 0..questions {
                    sleep(PAUSE);
                    let began = Instant::now();
                    asked.state()?;
                    bench.time("state", None, subject.name(), began.elapsed());
                }
            }
            container.end()?;
        }
    }
    Ok(())
}

/// All are killed by the bench itself, so that what is measured is how a shim learns of exits, and
/// answers `Wait` on as many connections.
pub(super) fn exits(bench: &mut Bench<'_>) -> anyhow::Result<()> {
    for round in 0..bench.rounds(2, 1).min(2) {
        // In a quick run ours and one of the others, if there is no more time.
        let shims = bench.in_turn(round).into_iter();
        let shims = shims.filter(|subject| subject.shim().is_some());
        for (number, subject) in (0..).zip(shims) {
            if !bench.is_late(number, 2) {
                end_together(bench, subject)?;
            }
        }
    }
    Ok(())
}

fn end_together(bench: &mut Bench<'_>, subject: &Subject) -> anyhow::Result<()> {
    let exits = if bench.is_short() { FEWER_EXITS } else { EXITS };
    let mut containers = running_many(bench, subject, exits)?;
    let pids = containers
        .iter()
        .map(|container| i32::try_from(container.pid()));
    let pids: Vec<i32> = pids.collect::<Result<_, _>>()?;
    let waited = containers.iter_mut().map(ShimContainer::take_exit);
    let waited = waited.collect::<anyhow::Result<Vec<_>>>()?;
    let began = Instant::now();
    for pid in pids {
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    }
    let ended = collect(waited)?;
    let at = u64::try_from(exits).ok();
    let mut last = Duration::ZERO;
    for (when, _) in &ended {
        last = when.duration_since(began);
        bench.time("exits at once", at, subject.name(), last);
    }
    bench.time("exits at once/last", at, subject.name(), last);
    for mut container in containers {
        container.delete()?;
        container.clean_up()?.remove()?;
    }
    Ok(())
}

/// Containers of a shim that run.
pub(super) fn running_many(
    bench: &mut Bench<'_>,
    subject: &Subject,
    count: usize,
) -> anyhow::Result<Vec<ShimContainer>> {
    let mut containers = Vec::with_capacity(count);
    for _ in 0..count {
        match bench.running(subject).context("one of many")? {
            Container::Shim(container) => containers.push(container),
            Container::Bare(_) => anyhow::bail!("{} is no shim", subject.name()),
        }
    }
    Ok(containers)
}

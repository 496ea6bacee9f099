//! Anonymous memory with 0, 50 and 500 idle containers, and after they were deleted; and how long
//! the daemon is missed when it is killed while it serves 500. Containers of runc, as others have
//! them; a shim for each of 500 would not fit everywhere, so others have 50.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Bench;
use super::state::running_many;
use crate::client::collect;
use crate::process::anonymous_of;
use crate::report::{OURS, Unit};
use crate::subject::{Ground, ShimContainer, Subject};

const FEW: usize = 50;
const MANY: usize = 500;
/// An idle daemon has given back what it does not need.
const REST: Duration = Duration::from_secs(10);
/// A daemon that dies younger than this is started again with a delay, which is not what is
/// measured.
const GROWN_UP: Duration = Duration::from_millis(1500);

/// Of all shims, once: memory hardly depends on the moment.
pub(super) fn measure(bench: &mut Bench<'_>) -> anyhow::Result<()> {
    let subject = bench.chosen.find(OURS).context("ours is always there")?;
    ours(bench, subject)?;
    for subject in bench.in_turn(0) {
        let is_theirs = subject.shim().is_some() && subject.name() != OURS;
        if is_theirs && !bench.is_late(1, 1) {
            theirs(bench, subject)?;
        }
    }
    Ok(())
}

/// Of a daemon that has served nothing else, since what it had at its peak it may keep.
fn ours(bench: &mut Bench<'_>, subject: &Subject) -> anyhow::Result<()> {
    bench.ground.sandbox().kill_daemon()?;
    rest(bench);
    let none = record(bench, "memory", 0)?;
    let mut containers = running_many(bench, subject, FEW)?;
    rest(bench);
    record(bench, "memory", FEW)?;
    if !bench.is_short() {
        containers.extend(running_many(bench, subject, MANY - FEW)?);
        rest(bench);
        record(bench, "memory", MANY)?;
    }
    let count = u32::try_from(containers.len())?;
    let full = anonymous_of(&bench.ground.daemon_and_keeper()?)?;
    let each = (full - none) / f64::from(count);
    bench
        .recorder
        .record("memory/each", OURS, Unit::Kilobytes, each);
    for container in containers {
        container.end()?;
    }
    rest(bench);
    record(bench, "memory/after deletion of", usize::try_from(count)?)?;
    Ok(())
}

fn theirs(bench: &mut Bench<'_>, subject: &Subject) -> anyhow::Result<()> {
    let mut containers = running_many(bench, subject, FEW)?;
    let pids = containers.iter_mut().map(|container| {
        let pid = container.shim_pid()?;
        Ok(i32::try_from(pid)?)
    });
    let pids = pids.collect::<anyhow::Result<Vec<i32>>>()?;
    sleep(Duration::from_secs(2));
    let memory = anonymous_of(&pids)?;
    let at = u64::try_from(FEW).ok();
    bench
        .recorder
        .record_at("memory", at, subject.name(), Unit::Kilobytes, memory);
    for container in containers {
        container.end()?;
    }
    Ok(())
}

fn rest(bench: &Bench<'_>) {
    sleep(if bench.is_short() { REST / 2 } else { REST });
}

fn record(bench: &mut Bench<'_>, name: &str, containers: usize) -> anyhow::Result<f64> {
    let memory = anonymous_of(&bench.ground.daemon_and_keeper()?)?;
    let at = u64::try_from(containers).ok();
    bench
        .recorder
        .record_at(name, at, OURS, Unit::Kilobytes, memory);
    Ok(memory)
}

/// With containers of its own: a killed daemon's successor has not the memory of its peak.
pub(super) fn takeover(bench: &mut Bench<'_>) -> anyhow::Result<()> {
    let subject = bench.chosen.find(OURS).context("ours is always there")?;
    let count = if bench.is_short() { FEW } else { MANY };
    let mut containers = running_many(bench, subject, count)?;
    takeovers(bench, &mut containers)?;
    for container in containers {
        container.end()?;
    }
    Ok(())
}

/// See [`kill_and_ask`].
fn takeovers(bench: &mut Bench<'_>, containers: &mut [ShimContainer]) -> anyhow::Result<()> {
    let at = u64::try_from(containers.len()).ok();
    for _ in 0..bench.rounds(10, 3).min(10) {
        let (first, all) = kill_and_ask(bench.ground, containers)?;
        bench.time("killed daemon/first State", at, OURS, first);
        bench.time("killed daemon/all States", at, OURS, all);
    }
    Ok(())
}

/// From the kill to the first answer, and to the last of one on each connection.
pub(super) fn kill_and_ask(
    ground: &Ground,
    containers: &mut [ShimContainer],
) -> anyhow::Result<(Duration, Duration)> {
    let [daemon, _] = ground.daemon_and_keeper()?;
    let began = Instant::now();
    kill(Pid::from_raw(daemon), Signal::SIGKILL)?;
    let asked = containers.iter_mut().map(ShimContainer::ask_state);
    let answers = collect(asked.collect::<anyhow::Result<Vec<_>>>()?)?;
    for (_, state) in &answers {
        ensure!(state.pid > 0, "{} has no pid", state.id);
    }
    let times = answers.iter().map(|(when, _)| when.duration_since(began));
    let first = answers.first().context("no answer")?.0;
    let all = times.max().unwrap_or_default();
    ground.sandbox().successor_of(daemon)?;
    sleep(GROWN_UP);
    Ok((first.duration_since(began), all))
}

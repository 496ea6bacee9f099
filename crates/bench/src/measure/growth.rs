//! What grows with the number of containers, up to thousands. Those are of a runtime that starts
//! one small process each (`tests/crowd/echo_runtime.c`), since runc would take an hour; the life
//! that is measured beside them is runc's.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::sys::resource::{Resource, getrlimit};
use testbed::image;

use super::Bench;
use super::lives::live;
use super::memory::kill_and_ask;
use crate::process::{activity, anonymous_of, descriptors};
use crate::report::{FLOOR, OURS, Unit};
use crate::subject::{Shim, ShimContainer, Subject, fake_runtime};

const STEPS: [u64; 7] = [0, 10, 100, 1000, 2000, 5000, 10_000];
const IDLE: Duration = Duration::from_secs(5);
const REST: Duration = Duration::from_secs(5);
/// What a container takes of the machine's memory, generously: a process, its kernel's share, our
/// connection.
const CONTAINER_KB: u64 = 600;
/// The open files that a container takes of the daemon's, without streams, and those that it needs
/// for everything else. It creates no container that a successor could not take over.
const FILES_OF_A_CONTAINER: u64 = 2;
const OTHER_FILES: u64 = 2000;

pub(super) fn measure(bench: &mut Bench<'_>) -> anyhow::Result<()> {
    let ours = bench.chosen.find(OURS).context("ours is always there")?;
    let floor = bench
        .chosen
        .find(FLOOR)
        .context("the floor is always there")?;
    let shim = ours.shim().context("ours is a shim")?;
    let runtime = bench.ground.directory().join("small_runtime");
    image::compile_echo_runtime(&runtime)?;
    let largest = bench.options.containers.unwrap_or(u64::MAX).min(that_fit());
    let mut containers = Vec::new();
    for step in STEPS.into_iter().filter(|step| *step <= largest) {
        let began = Instant::now();
        while (containers.len() as u64) < step {
            containers.push(small(bench, shim, &runtime)?);
        }
        println!(
            "  {step} containers, made in {} s",
            began.elapsed().as_secs()
        );
        sleep(REST);
        idle(bench, step)?;
        lives(bench, [ours, floor], step)?;
        answers(bench, &mut containers, step)?;
    }
    // They end with the sandbox: to delete thousands one by one would take as long again.
    Ok(())
}

/// How many containers this machine has the memory and the open files for.
fn that_fit() -> u64 {
    let files = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard);
    let by_files = files.saturating_sub(OTHER_FILES) / FILES_OF_A_CONTAINER;
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let free = free.and_then(|free| free.split_whitespace().next()?.parse::<u64>().ok());
    by_files.min(free.unwrap_or_default() / 2 / CONTAINER_KB)
}

fn small(bench: &mut Bench<'_>, shim: &Shim, runtime: &Path) -> anyhow::Result<ShimContainer> {
    let id = bench.id();
    let bundle = bench.ground.bundle(&id)?;
    let mut container = shim.launch(bench.ground, &id, bundle)?;
    container.create(fake_runtime(runtime))?;
    container.start()?;
    Ok(container)
}

fn idle(bench: &mut Bench<'_>, at: u64) -> anyhow::Result<()> {
    let pids = bench.ground.daemon_and_keeper()?;
    let [daemon, keeper] = pids;
    let memory = anonymous_of(&pids)?;
    let open = descriptors(daemon)? + descriptors(keeper)?;
    let (waits, time) = activity(daemon)?;
    sleep(IDLE);
    let (waits_after, time_after) = activity(daemon)?;
    let each_second = |before: f64, after: f64| (after - before).max(0.0) / IDLE.as_secs_f64();
    let figures = [
        ("growth/memory", Unit::Kilobytes, memory),
        ("growth/descriptors", Unit::Number, f64::from(open)),
        (
            "growth/idle: wake-ups a second",
            Unit::Number,
            each_second(waits, waits_after),
        ),
        (
            "growth/idle: processor time a second",
            Unit::Milliseconds,
            each_second(time, time_after),
        ),
    ];
    for (name, unit, value) in figures {
        bench.recorder.record_at(name, Some(at), OURS, unit, value);
    }
    Ok(())
}

fn lives(bench: &mut Bench<'_>, subjects: [&Subject; 2], at: u64) -> anyhow::Result<()> {
    for _ in 0..bench.rounds(10, 3).min(20) {
        for subject in subjects {
            let id = bench.id();
            let life = live(bench.ground, subject, &id, true)?;
            bench.time("growth/life", Some(at), subject.name(), life.total());
        }
    }
    Ok(())
}

/// State, and the first answers of a successor; without containers there is nothing to ask.
fn answers(bench: &mut Bench<'_>, containers: &mut [ShimContainer], at: u64) -> anyhow::Result<()> {
    let step = (containers.len() / 200).max(1);
    for container in containers.iter_mut().step_by(step) {
        let began = Instant::now();
        container.state()?;
        bench.time("growth/state", Some(at), OURS, began.elapsed());
    }
    if containers.is_empty() {
        return Ok(());
    }
    for _ in 0..3 {
        let (first, all) = kill_and_ask(bench.ground, containers)?;
        bench.time("growth/killed daemon: first State", Some(at), OURS, first);
        bench.time("growth/killed daemon: all States", Some(at), OURS, all);
    }
    Ok(())
}

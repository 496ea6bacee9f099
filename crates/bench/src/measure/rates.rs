//! Lives per second, 1 to 32 at once, and how long State takes meanwhile: of a container of the
//! same shim, by a connection of its own.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::anyhow;

use super::Bench;
use super::lives::live;
use crate::report::Unit;
use crate::subject::{Container, Ground, ShimContainer, Subject};

const AT_ONCE: [u64; 4] = [1, 2, 8, 32];
/// Between two questions for the state.
const PAUSE: Duration = Duration::from_millis(5);

pub(super) fn measure(bench: &mut Bench<'_>) -> anyhow::Result<()> {
    for round in 0..bench.rounds(3, 1).min(3) {
        for (level, at_once) in (0..).zip(AT_ONCE) {
            // Of a quick run; a full one has no limit.
            if bench.is_late(level, 2) {
                break;
            }
            for subject in bench.in_turn(round) {
                one(bench, subject, at_once)?;
            }
        }
    }
    Ok(())
}

fn one(bench: &mut Bench<'_>, subject: &Subject, at_once: u64) -> anyhow::Result<()> {
    let lives = usize::try_from(at_once)? + if bench.is_short() { 8 } else { 16 };
    let ids: Vec<String> = (0..lives).map(|_| bench.id()).collect();
    let ground = bench.ground;
    let mut asked = match subject.shim() {
        Some(_) => Some(bench.running(subject)?),
        None => None,
    };
    let (took, states) = {
        let asked = match &mut asked {
            Some(Container::Shim(asked)) => Some(asked),
            _ => None,
        };
        all_at_once(ground, subject, &ids, at_once, asked)?
    };
    let rate = f64::from(u32::try_from(lives)?) / took.as_secs_f64();
    let at = Some(at_once);
    let name = subject.name();
    bench
        .recorder
        .record_at("rate", at, name, Unit::PerSecond, rate);
    for state in states {
        bench.time("state beside lives", at, name, state);
    }
    asked.map_or(Ok(()), Container::end)
}

/// How long all lives took, and each State meanwhile.
fn all_at_once(
    ground: &Ground,
    subject: &Subject,
    ids: &[String],
    at_once: u64,
    asked: Option<&mut ShimContainer>,
) -> anyhow::Result<(Duration, Vec<Duration>)> {
    let next = AtomicUsize::new(0);
    let (is_over, failure) = (AtomicBool::new(false), Mutex::new(None));
    let work = || {
        while let Some(id) = ids.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = live(ground, subject, id, false) {
                let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
                *failure = Some(error);
            }
        }
    };
    let began = Instant::now();
    let (took, states) = thread::scope(|scope| {
        let asking = asked.map(|asked| scope.spawn(|| ask_until(&is_over, asked)));
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        let ended = workers.into_iter().all(|worker| worker.join().is_ok());
        let took = began.elapsed();
        is_over.store(true, Ordering::Relaxed);
        let states = asking.map(|asking| asking.join().map_err(|_| anyhow!("a thread panicked")));
        let states = states.map_or(Ok(Ok(Vec::new())), |states| states);
        if ended {
            Ok((took, states??))
        } else {
            Err(anyhow!("a thread panicked"))
        }
    })?;
    match failure.into_inner() {
        Ok(None) => Ok((took, states)),
        Ok(Some(error)) => Err(error),
        Err(_) => Err(anyhow!("a thread panicked")),
    }
}

fn ask_until(is_over: &AtomicBool, asked: &mut ShimContainer) -> anyhow::Result<Vec<Duration>> {
    let mut took = Vec::new();
    while !is_over.load(Ordering::Relaxed) {
        let began = Instant::now();
        asked.state()?;
        took.push(began.elapsed());
        thread::sleep(PAUSE);
    }
    Ok(took)
}

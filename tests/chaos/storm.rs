//! The storm: workers live lives while the killer kills. Owns the threads and the end: each worker
//! finishes what it has begun.

use std::time::{Duration, Instant};

use testbed::chaos::Options;

use crate::ground::Ground;
use crate::ledger::DEADLINE;
use crate::plan::Life;
use crate::random::Random;
use crate::{containerd, direct, killer, pods, runtime_killer, sandboxes};

/// Streams of numbers: workers of both kinds, and the killer.
const DIRECT: u64 = 1;
const CONTAINERD: u64 = 2;
const KILLER: u64 = 3;
/// So many of a hundred lives are a pod's.
const PODS: u64 = 8;
/// And so many of the others a pod's of our sandbox controller.
const SANDBOXES: u64 = 8;

/// The life of a worker with this number, told from the seed alone.
fn random_of(options: &Options, kind: u64, worker: u64, life: u64) -> Random {
    Random::of(options.seed(), &[kind, worker, life])
}

/// Goes on for `time`, and then until all lives have ended.
pub(crate) fn blow(ground: &Ground, options: &Options, time: Duration) {
    let began = Instant::now();
    let goes_on = || began.elapsed() < time && !ground.ledger.has_failures();
    std::thread::scope(|scope| {
        let mut workers = Vec::new();
        for worker in 0..options.direct {
            workers.push(scope.spawn(move || {
                for number in (0..).take_while(|_| goes_on()) {
                    let mut random = random_of(options, DIRECT, worker, number);
                    let id = format!("d{worker}-{number}");
                    if random.chance(PODS) {
                        pods::live(ground, &id, &mut random);
                    } else if random.chance(SANDBOXES) {
                        sandboxes::live(ground, &id, &mut random);
                    } else {
                        direct::live(ground, &id, &Life::of(&mut random));
                    }
                }
            }));
        }
        for worker in 0..options.containerd {
            workers.push(scope.spawn(move || {
                for number in (0..).take_while(|_| goes_on()) {
                    let mut random = random_of(options, CONTAINERD, worker, number);
                    containerd::live(ground, &format!("c{worker}-{number}"), &mut random);
                }
            }));
        }
        if !options.no_kills {
            scope.spawn(move || {
                let mut random = random_of(options, KILLER, 0, 0);
                killer::kill_on(ground, &mut random, options.containerd > 0);
            });
        }
        if !options.no_kills {
            scope.spawn(move || {
                let mut random = random_of(options, KILLER, 1, 0);
                runtime_killer::kill_on(ground, &mut random);
            });
        }
        // The killers go on until the last of them has ended, so that ends are disturbed as much
        // as beginnings.
        for worker in workers {
            if worker.join().is_err() {
                ground.ledger.failure("a worker panicked");
            }
        }
        ground.end();
    });
    if began.elapsed() > time + 4 * DEADLINE {
        ground.ledger.failure("the last lives took too long");
    }
}

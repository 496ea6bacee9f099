//! The killer: ends the daemon at random instants, in every manner, and containerd too. Its plan is
//! a function of the seed; what it meets at those instants is not.

use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::ground::Ground;
use crate::random::Random;
use crate::runtime_killer::RuntimeDeed;

/// Between two deeds, on average, when they come thick and fast.
const MEAN: Duration = Duration::from_millis(350);
/// So many of a hundred times a daemon lives long enough that its keeper forgets those before.
const PEACE: u64 = 30;
/// When its keeper has begun to wait so long, a burst is over.
const LONG: Duration = Duration::from_millis(1500);
/// A daemon that came so late was held back by its keeper.
const BACKOFF: Duration = Duration::from_millis(700);

/// One deed.
#[derive(Clone, Copy, Debug)]
enum Deed {
    Kill,
    /// As soon as the next is there, again: until its keeper thinks that it will never live.
    Burst {
        times: u64,
    },
    Freeze {
        ms: u64,
    },
    /// Killed while it is frozen.
    KillFrozen {
        ms: u64,
    },
    Signal(Signal),
    /// The keeper alone: the daemon takes its place.
    Keeper,
    FreezeKeeper {
        ms: u64,
    },
    Containerd {
        is_polite: bool,
    },
    /// Together with a call of the runtime.
    Runtime(RuntimeDeed),
}

impl Deed {
    fn of(random: &mut Random, has_containerd: bool) -> Self {
        match random.below(100) {
            0..=38 => Self::Kill,
            39..=46 => Self::Runtime(RuntimeDeed::with_daemon(random)),
            47..=51 => Self::Keeper,
            52..=54 => Self::FreezeKeeper {
                ms: random.millis(2000),
            },
            55..=59 => Self::Burst {
                times: 4 + random.below(8),
            },
            60..=67 => Self::Freeze {
                ms: random.millis(900),
            },
            68..=72 => Self::KillFrozen {
                ms: random.millis(300),
            },
            73..=80 => Self::Signal(Signal::SIGTERM),
            81..=84 => Self::Signal(Signal::SIGHUP),
            85..=88 => Self::Signal(Signal::SIGINT),
            _ if !has_containerd => Self::Kill,
            number => Self::Containerd {
                is_polite: number % 2 == 0,
            },
        }
    }
}

/// Kills until it is over.
pub(crate) fn kill_on(ground: &Ground, random: &mut Random, has_containerd: bool) {
    while !ground.is_over() {
        let (is_peace, gap) = (random.chance(PEACE), random.gap(MEAN));
        let deed = Deed::of(random, has_containerd);
        sleep(if is_peace {
            gap + Duration::from_millis(1100)
        } else {
            gap
        });
        if ground.is_over() {
            return;
        }
        if let Err(error) = perform(ground, deed) {
            ground.ledger.failure(&format!("{deed:?}: {error:#}"));
            return;
        }
    }
}

fn perform(ground: &Ground, deed: Deed) -> anyhow::Result<()> {
    match deed {
        Deed::Kill => end(ground, Signal::SIGKILL, "kill").map(drop),
        Deed::Signal(signal) => end(ground, signal, "polite end").map(drop),
        Deed::Burst { times } => {
            for _ in 0..times {
                if end(ground, Signal::SIGKILL, "kill in a burst")? > LONG {
                    break;
                }
            }
            Ok(())
        }
        Deed::Freeze { ms } => freeze(ground, ms, Signal::SIGCONT, "freeze"),
        Deed::KillFrozen { ms } => freeze(ground, ms, Signal::SIGKILL, "kill while frozen"),
        Deed::Keeper => end_keeper(ground),
        Deed::FreezeKeeper { ms } => {
            if let Some(keeper) = ground.daemons.keeper() {
                ground.ledger.kill("keeper frozen");
                keeper.signal(Signal::SIGSTOP);
                sleep(Duration::from_millis(ms));
                keeper.signal(Signal::SIGCONT);
            }
            Ok(())
        }
        Deed::Containerd { is_polite } => {
            ground.ledger.kill(if is_polite {
                "containerd stopped"
            } else {
                "containerd killed"
            });
            ground.without_containerd(is_polite, |_| Ok(()))
        }
        Deed::Runtime(deed) => deed.perform(ground),
    }
}

/// Ends the daemon and waits for the next; how long that took.
pub(crate) fn end(ground: &Ground, signal: Signal, kind: &'static str) -> anyhow::Result<Duration> {
    let daemon = ground.daemons.successor(None)?;
    ground.ledger.kill(kind);
    daemon.signal(signal);
    let since = Instant::now();
    let next = ground.daemons.successor(Some(daemon))?;
    let took = since.elapsed();
    ground
        .ledger
        .note(&format!("daemon {} after {took:?}", next.pid));
    // A polite end takes the time that what is under way takes.
    if signal == Signal::SIGKILL && took > BACKOFF {
        ground.ledger.kill("backoff");
    }
    Ok(took)
}

fn end_keeper(ground: &Ground) -> anyhow::Result<()> {
    let daemon = ground.daemons.successor(None)?;
    let Some(keeper) = ground.daemons.keeper() else {
        return Ok(());
    };
    // A keeper that starts the next daemon this moment has none to take its place.
    if !daemon.is_alive() {
        return Ok(());
    }
    ground.ledger.kill("keeper killed");
    keeper.signal(Signal::SIGKILL);
    ground.daemons.succession(daemon)
}

fn freeze(ground: &Ground, ms: u64, then: Signal, kind: &'static str) -> anyhow::Result<()> {
    let daemon = ground.daemons.successor(None)?;
    ground.ledger.kill(kind);
    daemon.signal(Signal::SIGSTOP);
    sleep(Duration::from_millis(ms));
    daemon.signal(then);
    if then == Signal::SIGKILL {
        ground.daemons.successor(Some(daemon))?;
    }
    Ok(())
}

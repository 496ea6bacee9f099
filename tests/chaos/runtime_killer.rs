//! [`RuntimeDeed`]: what the killer does to a call of the OCI runtime, alone or with the daemon
//! that waits for it. Says in the ledger for which process it kills one, before it does.

use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::ground::Ground;
use crate::killer::end;
use crate::random::Random;
use crate::runtimes::{Call, under_way};

/// Between two deeds, on average.
const MEAN: Duration = Duration::from_millis(250);
/// How long a call of the wanted kind is waited for; after that any will do.
const PATIENCE: Duration = Duration::from_millis(700);
/// The time between two looks.
const LOOK: Duration = Duration::from_millis(8);
/// Most calls take less, but for those that have much to write or many to wait for.
const LENGTH_MS: u64 = 70;

/// What is done.
#[derive(Clone, Copy, Debug)]
enum Manner {
    Kill,
    /// The daemon first: its successor finds no call, or one that ends while it looks.
    KillWithDaemon,
    Freeze {
        ms: u64,
    },
    FreezeWithDaemon {
        ms: u64,
    },
    /// It goes on under the next daemon.
    FreezeAndKillDaemon {
        ms: u64,
    },
}

/// One deed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RuntimeDeed {
    /// Any, if there is none.
    wanted: Option<&'static str>,
    /// After it was seen.
    after_ms: u64,
    manner: Manner,
}

impl RuntimeDeed {
    /// To the call alone.
    fn alone(random: &mut Random) -> Self {
        let ms = random.millis(1500);
        let manner = match random.below(20) {
            0..=16 => Manner::Kill,
            _ => Manner::Freeze { ms },
        };
        Self::of(random, manner)
    }

    /// To the call and to the daemon.
    pub(crate) fn with_daemon(random: &mut Random) -> Self {
        let ms = random.millis(1500);
        let manner = match random.below(3) {
            0 => Manner::KillWithDaemon,
            1 => Manner::FreezeAndKillDaemon { ms },
            _ => Manner::FreezeWithDaemon { ms },
        };
        Self::of(random, manner)
    }

    fn of(random: &mut Random, manner: Manner) -> Self {
        let wanted = match random.below(20) {
            0..=2 => Some("create"),
            3..=5 => Some("start"),
            6..=8 => Some("exec"),
            9..=10 => Some("delete"),
            11..=12 => Some("pause"),
            13 => Some("resume"),
            14 => Some("kill"),
            15 => Some("checkpoint"),
            16 => Some("restore"),
            17 => Some("state"),
            _ => None,
        };
        let after_ms = random.millis(LENGTH_MS);
        Self {
            wanted,
            after_ms,
            manner,
        }
    }

    /// Does it, if such a call is there before the patience is over.
    pub(crate) fn perform(self, ground: &Ground) -> anyhow::Result<()> {
        let Some(call) = self.find(ground) else {
            return Ok(());
        };
        sleep(Duration::from_millis(self.after_ms));
        match self.manner {
            Manner::Kill => kill(ground, &call),
            Manner::KillWithDaemon => {
                end(ground, Signal::SIGKILL, "kill with a runtime")?;
                kill(ground, &call);
            }
            Manner::Freeze { ms } => freeze(ground, &call, || {
                sleep(Duration::from_millis(ms));
                Ok(())
            })?,
            Manner::FreezeWithDaemon { ms } => freeze(ground, &call, || {
                let daemon = ground.daemons.successor(None)?;
                ground.ledger.kill("freeze with a runtime");
                daemon.signal(Signal::SIGSTOP);
                sleep(Duration::from_millis(ms));
                daemon.signal(Signal::SIGCONT);
                Ok(())
            })?,
            Manner::FreezeAndKillDaemon { ms } => freeze(ground, &call, || {
                end(ground, Signal::SIGKILL, "kill over a frozen runtime")?;
                sleep(Duration::from_millis(ms));
                Ok(())
            })?,
        }
        Ok(())
    }

    fn find(self, ground: &Ground) -> Option<Call> {
        let since = Instant::now();
        while since.elapsed() < 2 * PATIENCE && !ground.is_over() {
            let is_any = since.elapsed() > PATIENCE;
            let is_wanted =
                |call: &Call| is_any || self.wanted.is_none_or(|wanted| wanted == call.operation);
            let found = under_way(&ground.directory).into_iter().find(is_wanted);
            if found.is_some() {
                return found;
            }
            sleep(LOOK);
        }
        None
    }
}

/// Does this to calls until it is over, beside the killer of daemons.
pub(crate) fn kill_on(ground: &Ground, random: &mut Random) {
    while !ground.is_over() {
        let (deed, gap) = (RuntimeDeed::alone(random), random.gap(MEAN));
        if let Err(error) = deed.perform(ground) {
            ground.ledger.failure(&format!("{deed:?}: {error:#}"));
            return;
        }
        sleep(gap);
    }
}

/// It may have ended: then nothing is killed, and nothing is excused.
fn kill(ground: &Ground, call: &Call) {
    if !call.victim.is_alive() {
        return;
    }
    ground.ledger.runtime_killed(call.operation, &call.process);
    if call.victim.signal(Signal::SIGKILL) {
        ground.ledger.kill(killed(call.operation));
    }
}

fn freeze(
    ground: &Ground,
    call: &Call,
    meanwhile: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    if !call.victim.is_alive() {
        return Ok(());
    }
    ground.ledger.kill("runtime frozen");
    call.victim.signal(Signal::SIGSTOP);
    let done = meanwhile();
    call.victim.signal(Signal::SIGCONT);
    done
}

fn killed(operation: &str) -> &'static str {
    match operation {
        "create" => "runc create killed",
        "start" => "runc start killed",
        "exec" => "runc exec killed",
        "delete" => "runc delete killed",
        "kill" => "runc kill killed",
        "pause" => "runc pause killed",
        "resume" => "runc resume killed",
        "state" => "runc state killed",
        "checkpoint" => "runc checkpoint killed",
        _ => "runc restore killed",
    }
}

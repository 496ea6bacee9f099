//! What a life costs that a machine's load does not change: system calls and context switches, of
//! the shim, of its launchers, and of the runtime; and the time that each has on a processor.

use std::thread::sleep;
use std::time::Duration;

use super::Bench;
use super::lives::live;
use crate::count::{Cost, Part};
use crate::report::{OURS, Unit};
use crate::subject::{Ground, Subject};

/// What follows a life, in a daemon or in the kernel, has come to its end by then.
const REST: Duration = Duration::from_millis(500);
/// Lives counted together.
const LIVES: u32 = 10;

pub(super) fn measure(bench: &mut Bench<'_>) -> anyhow::Result<()> {
    let Some(mut counter) = bench.counter.take() else {
        return Ok(());
    };
    for round in 0..bench.rounds(12, 5) {
        if bench.is_late(round, 1) {
            break;
        }
        for subject in bench.in_turn(round) {
            if bench.options.counts_only && subject.name() != OURS {
                continue;
            }
            let ids: Vec<String> = (0..LIVES).map(|_| bench.id()).collect();
            let ground = bench.ground;
            // Not counted: it warms up what the last subject has cooled down.
            live(ground, subject, &bench.id(), true)?;
            sleep(REST);
            let ((), costs) = counter.of(|| Ok(((), lives(ground, subject, &ids)?)))?;
            let of = |part| costs.get(&part).copied().unwrap_or_default();
            record(
                bench,
                subject.name(),
                Part::Runtime.name(),
                of(Part::Runtime),
            );
            if subject.shim().is_some() {
                let (shim, launcher) = (of(Part::Shim), of(Part::Launcher));
                record(bench, subject.name(), Part::Shim.name(), shim);
                record(bench, subject.name(), Part::Launcher.name(), launcher);
                record(
                    bench,
                    subject.name(),
                    "shim and launcher",
                    shim.plus(launcher),
                );
            }
        }
    }
    bench.counter = Some(counter);
    Ok(())
}

/// The processes that have served them.
fn lives(ground: &Ground, subject: &Subject, ids: &[String]) -> anyhow::Result<Vec<u32>> {
    let mut shims = Vec::new();
    for id in ids {
        let bundle = ground.bundle(id)?;
        let mut container = subject.launch(ground, id, bundle)?;
        container.create()?;
        container.start()?;
        container.exec()?;
        shims.extend(container.shim_pid()?);
        container.kill()?;
        container.wait()?;
        container.delete()?;
        container.clean_up()?.remove()?;
    }
    sleep(REST);
    Ok(shims)
}

fn record(bench: &mut Bench<'_>, subject: &str, part: &str, cost: Cost) {
    let each = |number: u64| {
        #[expect(clippy::cast_precision_loss, reason = "counts of some thousands")]
        let number = number as f64;
        number / f64::from(LIVES)
    };
    let figures = [
        ("calls", Unit::Number, each(cost.calls)),
        ("switches", Unit::Number, each(cost.switches)),
        ("voluntary switches", Unit::Number, each(cost.voluntary)),
        ("processor", Unit::Milliseconds, each(cost.on_cpu_ns) / 1e6),
    ];
    for (name, unit, value) in figures {
        let name = format!("counts/{name}/{part}");
        bench.recorder.record(&name, subject, unit, value);
    }
}

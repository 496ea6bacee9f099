//! The parts of a run. Each takes the subjects in turn, round by round, so that what disturbs the
//! machine disturbs all, and records values; none prints results.

mod bench;
mod containerd;
mod counts;
mod growth;
mod lives;
mod memory;
mod mounts;
mod output;
mod rates;
mod state;
mod streams;
mod unwatched;

use std::time::{Duration, Instant};

use anyhow::Context;
use testbed::bench::Part;

pub(crate) use bench::Bench;

/// A part and what measures it.
type Measure = fn(&mut Bench<'_>) -> anyhow::Result<()>;

/// Each with the seconds after which a quick run begins no further round of it. In this order: what
/// leaves a daemon with a large heap comes last.
const PARTS: [(Part, Measure, u64); 13] = [
    (Part::Counts, counts::measure, 20),
    (Part::Lives, lives::measure, 30),
    (Part::State, state::idle, 5),
    (Part::Rates, rates::measure, 30),
    (Part::Output, output::measure, 10),
    (Part::Unwatched, unwatched::measure, 5),
    (Part::Containerd, containerd::measure, 15),
    (Part::Mounts, mounts::measure, 15),
    (Part::Exits, state::exits, 15),
    (Part::Streams, streams::measure, 10),
    (Part::Memory, memory::measure, 15),
    (Part::Takeover, memory::takeover, 10),
    (Part::Growth, growth::measure, 0),
];

/// Measures all parts that are asked for.
pub(crate) fn run(bench: &mut Bench<'_>) -> anyhow::Result<()> {
    for (part, measure, seconds) in PARTS {
        if bench.options.has(part) {
            let began = Instant::now();
            let limit = began + Duration::from_secs(seconds);
            bench.limit(bench.options.quick.then_some(limit));
            measure(bench).with_context(|| format!("{part:?}"))?;
            println!("{part:?}: {} s", began.elapsed().as_secs());
        }
    }
    Ok(())
}

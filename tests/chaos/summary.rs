//! The end of a run, for people and, in the last line, for programs.

use serde_json::json;

use crate::ledger::Counts;

/// Prints all numbers; whether the run has passed.
pub(crate) fn print(seed: u64, seconds: f64, counts: &Counts) -> bool {
    let passed = counts.failures.is_empty();
    let kills: Vec<String> = counts
        .kills
        .iter()
        .map(|(kind, count)| format!("{count} x {kind}"))
        .collect();
    println!("\nseed {seed}, {seconds:.0} s");
    println!(
        "  {} containers, {} execs, {} codes compared",
        counts.lives, counts.execs, counts.codes
    );
    let verdict = if passed {
        ", each number once and in order"
    } else {
        ""
    };
    println!(
        "  {} streams, {} bytes{verdict} ({} bytes twice in log files)",
        counts.streams, counts.bytes, counts.repeated
    );
    println!(
        "  {} requests answered, the slowest after {:.2} s ({})",
        counts.requests,
        counts.longest.as_secs_f64(),
        counts.longest_of
    );
    println!(
        "  {}",
        if kills.is_empty() {
            "nothing was killed".into()
        } else {
            kills.join(", ")
        }
    );
    println!(
        "  {} requests refused because their runtime was killed, and asked again",
        counts.refused
    );
    println!("  {} pods, {} checkpoints", counts.pods, counts.checkpoints);
    println!("  {} single steps", counts.steps);
    println!("  {} failures", counts.failures.len());
    for failure in &counts.failures {
        println!("    {failure}");
    }
    if !passed {
        println!("  the same plan again: cargo xtask chaos --seed {seed}");
    }
    let line = json!({
        "passed": passed, "seed": seed, "seconds": seconds, "lives": counts.lives,
        "execs": counts.execs,
        "codes": counts.codes, "streams": counts.streams, "bytes": counts.bytes, "repeated": counts.repeated, "requests": counts.requests, "longest_ms": u64::try_from(counts.longest.as_millis()).unwrap_or(u64::MAX),
        "kills": counts.kills, "steps": counts.steps, "refused": counts.refused, "pods": counts.pods, "checkpoints": counts.checkpoints, "failures": counts.failures.len(),
    });
    println!("{line}");
    passed
}

//! Whether exits are recorded: found out with the exit of a child, by the maps, the program
//! and the attachment that are in use. Nothing else says that these fit together on this machine
//! and in these namespaces.

use std::time::{Duration, Instant};

use exit_monitor::BootTime;
use exit_monitor::ExitStatus;
use exit_monitor::process::Process;

use crate::clocks;
use crate::maps::{Maps, number};
use crate::sys::Child;

/// An exit is missed if a task is preempted in each copy of the program at once, so one is no
/// proof.
const CHILDREN: usize = 3;
/// The record is there before the child can be reaped; the clocks have a resolution of their own.
const TOLERANCE: Duration = Duration::from_millis(20);

/// What came of it.
#[derive(Debug)]
pub(crate) enum Proof {
    /// The exit was recorded, exactly.
    Recorded,
    /// It was not, and nothing else will be.
    NotRecorded(String),
    /// No child could be used, which says nothing of the program.
    NotTried(String),
}

/// Tracks a child and kills it. What the maps have of other processes is not touched.
pub(crate) fn records_an_exit(maps: &mut Maps) -> Proof {
    let mut last = Proof::NotTried("no child was tried".into());
    for _ in 0..CHILDREN {
        last = match try_child(maps) {
            Ok(None) => return Proof::Recorded,
            Ok(Some(what)) => Proof::NotRecorded(explain(&what)),
            Err(why) => Proof::NotTried(why),
        };
    }
    last
}

/// What is wrong with the record of one child's exit, if anything.
fn try_child(maps: &mut Maps) -> Result<Option<String>, String> {
    let child = Child::fork().map_err(|error| format!("no child for trying: {error}"))?;
    let process = Process::open(child.pid()).map_err(|error| error.to_string())?;
    let identity = process.identity();
    if maps.knows(number(identity)) {
        return Err("the child has the number of a process whose exit is not confirmed".into());
    }
    maps.track(identity).map_err(|error| error.to_string())?;
    let (earliest, begin) = (BootTime::now(), Instant::now());
    drop(child);
    let recorded = maps.record(identity);
    maps.remove(number(identity));
    let Some(recorded) = recorded else {
        return Ok(Some("there was no record".into()));
    };
    let killed = ExitStatus::Signaled {
        signal: 9,
        core_dumped: false,
    };
    if recorded.status != killed {
        return Ok(Some(format!("recorded was {}", recorded.status)));
    }
    let tolerance = u64::try_from(TOLERANCE.as_nanos()).unwrap_or(u64::MAX);
    let longest = begin.elapsed().saturating_add(TOLERANCE * 2);
    let after = recorded
        .at
        .0
        .saturating_add(tolerance)
        .checked_sub(earliest.0);
    let is_then = after.is_some_and(|after| u128::from(after) <= longest.as_nanos());
    Ok((!is_then).then(|| "the recorded time was another".into()))
}

fn explain(what: &str) -> String {
    let place = if clocks::is_initial() {
        ""
    } else {
        "in a time namespace whose offsets (/proc/self/timens_offsets) are not those of this process or cannot be read, "
    };
    format!("{place}a child was killed and {what}")
}

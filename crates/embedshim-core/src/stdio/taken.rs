//! [`wait_until_taken`]: how long an exit waits for the client to read what its process has
//! written. Owns the limits of that; moves nothing itself.
//!
//! containerd's Go client, and with it ctr, nerdctl and every program that uses `cio`, closes its
//! ends of the streams when it deletes a task or an exec, which it does as soon as it hears of the
//! exit (containerd pull requests 5974 and 8334). What it has not read by then, it never reads. So
//! an exit is published when the client has everything, or does not read.

use std::time::{Duration, Instant};

use super::flow::Meter;
use super::flow_state::TERMINAL;
use super::pipe_size::LARGE;
use super::ready::has_bytes;
use crate::fdstore::ProcessFds;

/// A client that has read nothing for this long, though there was something to read, does not read.
const STALLED: Duration = Duration::from_millis(500);
/// The same for bytes that do not come from the process's pipe to the client's fifo, which is ours
/// to do: a container can hold its pipe's lock.
const STUCK: Duration = Duration::from_secs(2);
/// One that reads slowly is waited for no longer than this.
const LIMIT: Duration = Duration::from_secs(30);
/// When so many bytes were taken, all that was under way at the exit is among them: a stream goes
/// through three pipes. The rest comes from other processes that have the output open.
const UNDER_WAY: usize = 3 * LARGE;
/// The longest pause between two looks.
const PAUSE: Duration = Duration::from_millis(5);

/// Whether the client has already read everything, as far as that can be known without a lock or a
/// wait: then nothing has to be waited for in a thread.
pub(super) fn is_taken(fds: &ProcessFds, outputs: &[Meter]) -> bool {
    outputs.iter().all(|output| {
        let way = output.way;
        // A terminal's bytes can be on their way within the kernel.
        let is_terminal = way.source == TERMINAL;
        let source = fds.first(way.source).map(|(_, source)| source);
        let stage = way.stage.and_then(|stage| fds.get(stage));
        // Without a stage it is a log file, whose file system may not answer.
        let sink = way.stage.and(way.sink).and_then(|sink| fds.get(sink));
        !is_terminal && ![source, stage, sink].iter().flatten().any(has_bytes)
    })
}

/// Waits until the client has read what these outputs of a process that has ended contain. Blocks.
pub(super) fn wait_until_taken(fds: &ProcessFds, outputs: &[Meter]) {
    let began = Instant::now();
    let mut watched: Vec<Watched<'_>> = outputs
        .iter()
        .map(|meter| Watched::new(fds, meter))
        .collect();
    let mut pause = Duration::from_micros(250);
    let mut last_progress = began;
    loop {
        let mut patience = STALLED;
        let mut has_progressed = false;
        watched.retain_mut(|output| {
            let seen = output.look(fds);
            has_progressed |= seen == Seen::Progress;
            if seen == Seen::OnItsWay {
                patience = STUCK;
            }
            seen != Seen::Taken
        });
        let now = Instant::now();
        if has_progressed {
            last_progress = now;
        }
        if watched.is_empty() || now - last_progress >= patience || now - began >= LIMIT {
            return;
        }
        std::thread::sleep(pause);
        pause = (2 * pause).min(PAUSE);
    }
}

/// What one look at an output has shown.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// The client has everything.
    Taken,
    /// It has read since the last look.
    Progress,
    /// It has not, and could have.
    Unread,
    /// There is nothing that it could read now.
    OnItsWay,
}

struct Watched<'a> {
    meter: &'a Meter,
    /// What the client had read at first, and at the last look. Counted from any point: a
    /// predecessor has moved bytes that this daemon did not count.
    first: u64,
    last: u64,
}

impl<'a> Watched<'a> {
    fn new(fds: &ProcessFds, meter: &'a Meter) -> Self {
        let first = meter.moved().wrapping_sub(unread(fds, meter));
        Self {
            meter,
            first,
            last: first,
        }
    }

    fn look(&mut self, fds: &ProcessFds) -> Seen {
        let way = self.meter.way;
        let source = fds.first(way.source).map(|(_, source)| source);
        let stage = way.stage.and_then(|stage| fds.get(stage));
        // In the direction in which bytes go, so that what moves meanwhile is seen. Polling does
        // not need the pipe's lock, which the container may hold.
        let is_under_way = [source, stage].iter().flatten().any(has_bytes);
        let unread = unread(fds, self.meter);
        let read = self.meter.moved().wrapping_sub(unread);
        // Bytes are counted after they were moved: for an instant it is less than at first.
        let taken = usize::try_from(read.wrapping_sub(self.first).cast_signed()).unwrap_or(0);
        if !is_under_way && unread == 0 || taken >= UNDER_WAY {
            return Seen::Taken;
        }
        if read != self.last {
            self.last = read;
            return Seen::Progress;
        }
        if unread == 0 {
            Seen::OnItsWay
        } else {
            Seen::Unread
        }
    }
}

/// Bytes in the client's fifo. A log file takes everything at once.
fn unread(fds: &ProcessFds, meter: &Meter) -> u64 {
    let Some(sink) = meter.way.sink.and_then(|sink| fds.get(sink)) else {
        return 0;
    };
    // The kernel knows that without the file system of a log file, which may not answer.
    if rustix::pipe::fcntl_getpipe_size(&sink).is_err() {
        return 0;
    }
    rustix::io::ioctl_fionread(&sink).unwrap_or(0)
}

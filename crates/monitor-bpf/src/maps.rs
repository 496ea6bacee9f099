//! The two maps as user space sees them: which processes to record, and what was recorded. Owns the
//! layout that `exit.bpf.c` shares; changing it means a new pin directory (see `pins::LAYOUT`).

use aya::maps::{HashMap, Map, MapData, MapError};
use exit_monitor::BootTime;
use exit_monitor::ExitStatus;
use exit_monitor::process::ProcessIdentity;

/// The program's constants in their section: offset and size of `pid_namespace`, `has_boot_clock`,
/// `asleep_ns` and `boot_offset_ns`.
#[cfg(feature = "libbpf")]
pub(crate) const GLOBALS: [(usize, usize); 4] = [(0, 4), (4, 4), (8, 8), (16, 8)];
/// `struct exit_record` of the program: start ticks, boot-clock nanoseconds, wait status.
type RawRecord = [u64; 3];

/// What the kernel recorded of one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Recorded {
    pub(crate) status: ExitStatus,
    pub(crate) at: BootTime,
}

/// The maps.
#[derive(Debug)]
pub(crate) struct Maps {
    tracked: HashMap<MapData, u32, u64>,
    exited: HashMap<MapData, u32, RawRecord>,
    capacity: u32,
}

impl Maps {
    pub(crate) fn new(tracked: MapData, exited: MapData) -> Result<Self, MapError> {
        let capacity = tracked
            .info()?
            .max_entries()
            .min(exited.info()?.max_entries());
        let (tracked, exited) = (Map::HashMap(tracked), Map::HashMap(exited));
        Ok(Self {
            tracked: tracked.try_into()?,
            exited: exited.try_into()?,
            capacity,
        })
    }

    /// How many processes can be tracked.
    pub(crate) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// The numbers of all tracked processes.
    pub(crate) fn tracked(&self) -> Vec<u32> {
        self.tracked.keys().filter_map(Result::ok).collect()
    }

    /// The numbers of all recorded exits.
    pub(crate) fn recorded(&self) -> Vec<u32> {
        self.exited.keys().filter_map(Result::ok).collect()
    }

    /// Whether there is anything under this number.
    pub(crate) fn knows(&self, number: u32) -> bool {
        self.tracked.get(&number, 0).is_ok() || self.exited.get(&number, 0).is_ok()
    }

    /// From here on the exit of this process is recorded.
    pub(crate) fn track(&mut self, identity: ProcessIdentity) -> Result<(), MapError> {
        self.tracked
            .insert(number(identity), identity.start_ticks, 0)
    }

    /// What was recorded of this very process.
    pub(crate) fn record(&self, identity: ProcessIdentity) -> Option<Recorded> {
        let [start_ticks, at, raw] = self.exited.get(&number(identity), 0).ok()?;
        let status = i32::try_from(raw).map(ExitStatus::from_wait_status).ok()?;
        (start_ticks == identity.start_ticks).then_some(Recorded {
            status,
            at: BootTime(at),
        })
    }

    /// Removes what is known of a number, if anything is.
    pub(crate) fn remove(&mut self, number: u32) {
        // First `tracked`, or the program could write a record after it was removed.
        let _ = self.tracked.remove(&number);
        let _ = self.exited.remove(&number);
    }
}

/// Pids are positive; the map's keys are unsigned.
pub(crate) fn number(identity: ProcessIdentity) -> u32 {
    identity.pid.unsigned_abs()
}

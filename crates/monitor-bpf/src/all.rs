//! [`AllExits`]: every exit on the machine, as the kernel tells of it by a ring buffer. Owns its
//! program, which ends with it, and when an exit is believed; watches no process and pins nothing.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use aya::maps::{Array, Map, MapData, RingBuf};
use aya::programs::RawTracePoint;
use aya::programs::links::FdLink;
use aya::{Btf, EbpfLoader};
use exit_monitor::{BootTime, ExitStatus};

use crate::clocks::Offsets;
use crate::loader::LoadError;
use crate::object::{ALL_OBJECT, TRACEPOINT, own_pid_namespace};
use crate::program::{OpenError, refused};

/// Copies of one program, which tell of each exit twice: see the object.
const PROGRAMS: [&str; 2] = ["tell_exit", "tell_exit_2"];
/// How long an exit may be told of again, before it is believed.
const HOLD: Duration = Duration::from_millis(20);
/// The length of `struct exit_event` of the program.
const EVENT: usize = 48;

/// An exit of some process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenExit {
    /// The process's number, in the pid namespace of this process.
    pub pid: u64,
    /// When it began, as `/proc/PID/stat` counts.
    pub start_ticks: u64,
    /// How it ended, as its parent learns it.
    pub status: ExitStatus,
    /// When.
    pub at: BootTime,
    /// The name of its program, which it has chosen itself.
    pub command: String,
}

/// Every exit on the machine from now on, of processes in this process's pid namespace and below.
pub struct AllExits {
    ring: RingBuf<MapData>,
    lost: Array<MapData, u64>,
    /// What was told of, and when it was first read.
    held: Vec<(Instant, SeenExit)>,
    _links: Vec<FdLink>,
}

impl fmt::Debug for AllExits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AllExits")
            .field("held", &self.held)
            .finish_non_exhaustive()
    }
}

impl AllExits {
    /// Attaches the program, with the kernel's types from this file or from the kernel itself
    /// (Linux 5.8).
    pub fn open(btf: Option<PathBuf>) -> Result<Self, OpenError> {
        let has_btf = btf.is_some();
        Self::load(btf).map_err(|error| refused(error, has_btf))
    }

    fn load(btf: Option<PathBuf>) -> Result<Self, LoadError> {
        let btf = btf
            .map(|path| Btf::parse_file(path, aya::Endianness::default()))
            .transpose()?;
        let (namespace, boot_offset) = (own_pid_namespace(), Offsets::own().boot());
        let mut loader = EbpfLoader::new();
        loader
            .override_global("pid_namespace", &namespace, true)
            .override_global("boot_offset_ns", &boot_offset, true);
        if btf.is_some() {
            loader.btf(btf.as_ref());
        }
        let mut object = loader.load(ALL_OBJECT)?;
        let mut take = |name: &str| -> Result<Map, LoadError> {
            let map = object.take_map(name);
            map.ok_or_else(|| format!("the object lacks {name}").into())
        };
        let ring = RingBuf::try_from(take("exits")?)?;
        let lost = Array::try_from(take("lost")?)?;
        let mut links = Vec::new();
        for name in PROGRAMS {
            let program: &mut RawTracePoint = object
                .program_mut(name)
                .ok_or_else(|| format!("the object lacks {name}"))?
                .try_into()?;
            program.load()?;
            let link = program.attach(TRACEPOINT)?;
            links.push(program.take_link(link)?.into());
        }
        Ok(Self {
            ring,
            lost,
            held: Vec::new(),
            _links: links,
        })
    }

    /// The exits that are believed by now, in the order in which they were told of. Does not wait.
    pub fn take(&mut self) -> Vec<SeenExit> {
        let now = Instant::now();
        while let Some(item) = self.ring.next() {
            let Some(seen) = parse(&item) else { continue };
            let is_same = |(_, held): &&mut (Instant, SeenExit)| {
                (held.pid, held.start_ticks) == (seen.pid, seen.start_ticks)
            };
            match self.held.iter_mut().rev().find(is_same) {
                // What is told last counts.
                Some((_, held)) => *held = seen,
                None => self.held.push((now, seen)),
            }
        }
        let is_old = |(since, _): &(Instant, SeenExit)| now.duration_since(*since) >= HOLD;
        let old = self.held.iter().take_while(|held| is_old(held)).count();
        self.held.drain(..old).map(|(_, seen)| seen).collect()
    }

    /// How long to wait before something can be [taken](Self::take), if nothing more is told of;
    /// `None` if nothing is held.
    pub fn due(&self) -> Option<Duration> {
        let (since, _) = self.held.first()?;
        Some(HOLD.saturating_sub(since.elapsed()))
    }

    /// How many exits were not told of, because they were not taken fast enough.
    pub fn lost(&self) -> u64 {
        // Both programs count one that finds no room.
        self.lost.get(&0, 0).unwrap_or(0).div_ceil(2)
    }
}

/// Readable when something is told of.
impl AsFd for AllExits {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

/// Reads `struct exit_event`: start ticks, boot-clock nanoseconds, wait status, number, name.
fn parse(event: &[u8]) -> Option<SeenExit> {
    if event.len() != EVENT {
        return None;
    }
    let number = |at: usize| {
        let bytes = event.get(at..at + 8)?;
        Some(u64::from_ne_bytes(bytes.try_into().ok()?))
    };
    let name = event.get(32..)?.split(|&byte| byte == 0).next()?;
    let status = i32::try_from(number(16)?).ok()?;
    Some(SeenExit {
        start_ticks: number(0)?,
        at: BootTime(number(8)?),
        status: ExitStatus::from_wait_status(status),
        pid: number(24)?,
        command: String::from_utf8_lossy(name).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn an_event_is_read_as_the_program_writes_it() {
        let mut event = Vec::new();
        for number in [7u64, 11, 0x2a00, 4711] {
            event.extend(number.to_ne_bytes());
        }
        event.extend(b"sleep\0garbage\0\0\0");
        let seen = parse(&event).unwrap();
        assert_eq!(
            (seen.start_ticks, seen.at, seen.pid),
            (7, BootTime(11), 4711)
        );
        assert_eq!(seen.status, ExitStatus::Exited(42));
        assert_eq!(seen.command, "sleep");
        assert_eq!(parse(&event[1..]), None);
    }

    #[test]
    fn every_exit_is_told_of_once_with_its_status() {
        let mut all = match AllExits::open(None) {
            Ok(all) => all,
            Err(error) => {
                eprintln!("skipped, because {error}");
                return;
            }
        };
        let mut expected = Vec::new();
        for code in 0..50u8 {
            let mut child = Command::new("sh")
                .args(["-c", &format!("exit {code}")])
                .spawn()
                .unwrap();
            expected.push((u64::from(child.id()), ExitStatus::Exited(code)));
            child.wait().unwrap();
        }
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut seen = Vec::new();
        let is_ours = |exit: &SeenExit| expected.iter().any(|(pid, _)| *pid == exit.pid);
        while seen.len() < expected.len() && Instant::now() < deadline {
            let taken = all.take();
            seen.extend(taken.into_iter().filter(|exit| is_ours(exit)));
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(2 * HOLD);
        seen.extend(all.take().into_iter().filter(|exit| is_ours(exit)));
        let seen: Vec<_> = seen.iter().map(|exit| (exit.pid, exit.status)).collect();
        assert_eq!(seen, expected);
        assert_eq!(all.lost(), 0);
    }
}

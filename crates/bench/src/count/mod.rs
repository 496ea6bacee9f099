//! [`Counter`]: what processes cost, counted in the kernel by `bpf/count.bpf.c`: system calls,
//! context switches, time on a processor, of the bench's descendants only. Never traces: what is
//! counted runs as fast as ever, to some hundred nanoseconds a system call.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, anyhow};
use aya::maps::{HashMap, Map, MapData};
use aya::programs::RawTracePoint;
use aya::programs::raw_trace_point::RawTracePointLinkId;
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/count.bpf.o"));
/// Program and tracepoint.
const FORK: (&str, &str) = ("bench_fork", "sched_process_fork");
/// The same, of those that run only while something is counted.
const COUNTING: [(&str, &str); 2] = [
    ("bench_call", "sys_enter"),
    ("bench_switch", "sched_switch"),
];
/// Main threads' names, of which the kernel keeps 15 bytes.
const DAEMON: &str = "embedshimd";
const LAUNCHER: &str = "containerd-shim";
const BENCH: &str = "embedshim-bench";

/// What some processes have cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cost {
    pub(crate) calls: u64,
    pub(crate) switches: u64,
    pub(crate) voluntary: u64,
    pub(crate) on_cpu_ns: u64,
}

impl Cost {
    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            calls: self.calls + other.calls,
            switches: self.switches + other.switches,
            voluntary: self.voluntary + other.voluntary,
            on_cpu_ns: self.on_cpu_ns + other.on_cpu_ns,
        }
    }
}

/// Which processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// What serves: our daemon and keeper, or the shims of others.
    Shim,
    /// What containerd executes to start and to delete.
    Launcher,
    /// The OCI runtime with its children, up to the container's program.
    Runtime,
}

impl Part {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Shim => "shim",
            Self::Launcher => "launcher",
            Self::Runtime => "runtime",
        }
    }
}

/// Counts by process and name of its main thread, as the map has them.
type Snapshot = BTreeMap<(u32, String), Cost>;

/// The programs, loaded.
pub(crate) struct Counter {
    object: Ebpf,
    counts: HashMap<MapData, [u8; 20], [u64; 4]>,
}

impl std::fmt::Debug for Counter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Counter").finish_non_exhaustive()
    }
}

impl Counter {
    /// From now on descendants are known; nothing is counted yet.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let namespace = std::fs::metadata("/proc/self/ns/pid").context("/proc/self/ns/pid")?;
        let (device, inode) = (namespace.dev(), namespace.ino());
        let bench = std::process::id();
        let mut object = EbpfLoader::new()
            .override_global("bench", &bench, true)
            .override_global("namespace_device", &device, true)
            .override_global("namespace_inode", &inode, true)
            .load(OBJECT)
            .context("cannot load the counting program")?;
        let counts = take(&mut object, "counts")?.try_into()?;
        for (name, _) in COUNTING {
            program(&mut object, name)?.load().context(name)?;
        }
        let (name, tracepoint) = FORK;
        let fork = program(&mut object, name)?;
        fork.load().context(name)?;
        fork.attach(tracepoint).context(tracepoint)?;
        Ok(Self { object, counts })
    }

    /// What the bench's descendants cost while `work` is done, by part. Whatever is named in
    /// `shims` when it has been done is a shim, whatever its name.
    pub(crate) fn of<T>(
        &mut self,
        work: impl FnOnce() -> anyhow::Result<(T, Vec<u32>)>,
    ) -> anyhow::Result<(T, BTreeMap<Part, Cost>)> {
        let before = self.snapshot()?;
        let links = self.attach()?;
        let done = work();
        self.detach(links)?;
        let (done, shims) = done?;
        let after = self.snapshot()?;
        Ok((done, by_part(&before, &after, &shims)))
    }

    fn attach(&mut self) -> anyhow::Result<Vec<(&'static str, RawTracePointLinkId)>> {
        let mut links = Vec::new();
        for (name, tracepoint) in COUNTING {
            let link = program(&mut self.object, name)?.attach(tracepoint);
            links.push((name, link.context(tracepoint)?));
        }
        Ok(links)
    }

    fn detach(&mut self, links: Vec<(&'static str, RawTracePointLinkId)>) -> anyhow::Result<()> {
        for (name, link) in links {
            program(&mut self.object, name)?
                .detach(link)
                .context(name)?;
        }
        Ok(())
    }

    fn snapshot(&self) -> anyhow::Result<Snapshot> {
        let mut found = Snapshot::new();
        for entry in &self.counts {
            let (key, [calls, switches, voluntary, on_cpu_ns]) = entry.context("counts")?;
            let cost = Cost {
                calls,
                switches,
                voluntary,
                on_cpu_ns,
            };
            found.insert(parse(key), cost);
        }
        Ok(found)
    }
}

/// The number and the name, up to its zero.
fn parse(key: [u8; 20]) -> (u32, String) {
    let [a, b, c, d, name @ ..] = key;
    let name: Vec<u8> = name.into_iter().take_while(|byte| *byte != 0).collect();
    (
        u32::from_ne_bytes([a, b, c, d]),
        String::from_utf8_lossy(&name).into_owned(),
    )
}

fn by_part(before: &Snapshot, after: &Snapshot, shims: &[u32]) -> BTreeMap<Part, Cost> {
    let mut sums: BTreeMap<Part, Cost> = BTreeMap::new();
    for (process, cost) in after {
        let Some(part) = part_of(process, shims) else {
            continue;
        };
        let earlier = before.get(process).copied().unwrap_or_default();
        let sum = sums.entry(part).or_default();
        sum.calls += cost.calls.saturating_sub(earlier.calls);
        sum.switches += cost.switches.saturating_sub(earlier.switches);
        sum.voluntary += cost.voluntary.saturating_sub(earlier.voluntary);
        sum.on_cpu_ns += cost.on_cpu_ns.saturating_sub(earlier.on_cpu_ns);
    }
    sums
}

fn part_of((number, name): &(u32, String), shims: &[u32]) -> Option<Part> {
    match name.as_str() {
        // A child of the bench that is about to become something else.
        BENCH => None,
        DAEMON => Some(Part::Shim),
        _ if shims.contains(number) => Some(Part::Shim),
        LAUNCHER => Some(Part::Launcher),
        _ => Some(Part::Runtime),
    }
}

fn program<'a>(object: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut RawTracePoint> {
    let program = object.program_mut(name);
    Ok(program
        .with_context(|| format!("no program {name}"))?
        .try_into()?)
}

fn take(object: &mut Ebpf, name: &str) -> anyhow::Result<Map> {
    object
        .take_map(name)
        .ok_or_else(|| anyhow!("the object has no map {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(calls: u64) -> Cost {
        Cost {
            calls,
            ..Cost::default()
        }
    }

    #[test]
    fn costs_are_differences_and_belong_to_parts() {
        let process = |number, name: &str| (number, name.to_owned());
        let before = Snapshot::from([(process(7, DAEMON), cost(100))]);
        let after = Snapshot::from([
            (process(7, DAEMON), cost(130)),
            // Its child, before it became runc, and after.
            (process(8, DAEMON), cost(2)),
            (process(8, "runc"), cost(500)),
            (process(9, "runc:[2:INIT]"), cost(50)),
            (process(10, LAUNCHER), cost(40)),
            (process(11, LAUNCHER), cost(1000)),
            (process(12, BENCH), cost(3)),
        ]);
        let sums = by_part(&before, &after, &[11]);
        let parts = [Part::Shim, Part::Launcher, Part::Runtime];
        let calls = parts.map(|part| sums.get(&part).map_or(0, |cost| cost.calls));
        assert_eq!(calls, [1032, 40, 550]);
    }

    #[test]
    fn the_kernel_counts_children_and_nothing_else() {
        let mut counter = Counter::new().unwrap();
        let run = || {
            Ok((
                std::process::Command::new("/bin/true").status()?,
                Vec::new(),
            ))
        };
        let (status, costs) = counter.of(run).unwrap();
        assert!(status.success());
        let cost = costs[&Part::Runtime];
        // It is loaded, with its library, and ends, which is the one switch that must be.
        assert!(
            cost.calls > 10 && cost.switches > 0 && cost.on_cpu_ns > 0,
            "{cost:?}"
        );
        let ((), costs) = counter.of(|| Ok(((), Vec::new()))).unwrap();
        assert!(
            costs.values().all(|cost| *cost == Cost::default()),
            "{costs:?}"
        );
    }

    #[test]
    fn a_key_is_a_number_and_a_name() {
        let mut key = [0; 20];
        key[..4].copy_from_slice(&77_u32.to_ne_bytes());
        key[4..8].copy_from_slice(b"runc");
        assert_eq!(parse(key), (77, "runc".to_owned()));
    }
}

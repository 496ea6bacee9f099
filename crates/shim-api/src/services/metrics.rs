//! The core's counters as containerd's metrics messages, for cgroup v1 and v2, with the fields that
//! runc-v2 fills. Pure.

use containerd_shim_protos::{cgroups, cgroups_v2};
use embedshim_core::cgroup::{DeviceCounter, Metrics};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use ttrpc::Status;

use super::any::pack;

/// The kernel counts `cpuacct.stat` in `USER_HZ`, which is 100 on Linux.
const NANOSECONDS_PER_TICK: u64 = 10_000_000;

/// Packs the counters as `io.containerd.cgroups.v1.Metrics` or `v2`.
pub(crate) fn encode(metrics: &Metrics) -> Result<Any, Status> {
    if metrics.unified {
        pack("io.containerd.cgroups.v2.Metrics", &v2(metrics))
    } else {
        pack("io.containerd.cgroups.v1.Metrics", &v1(metrics))
    }
}

fn v1(m: &Metrics) -> cgroups::metrics::Metrics {
    use cgroups::metrics::{BlkIOStat, CPUStat, CPUUsage, MemoryOomControl, PidsStat, Throttle};
    let usage = CPUUsage {
        total: m.single("cpuacct.usage"),
        user: m
            .get("cpuacct.stat", "user")
            .saturating_mul(NANOSECONDS_PER_TICK),
        kernel: m
            .get("cpuacct.stat", "system")
            .saturating_mul(NANOSECONDS_PER_TICK),
        per_cpu: m.per_cpu.clone(),
        ..CPUUsage::default()
    };
    let throttling = Throttle {
        periods: m.get("cpu.stat", "nr_periods"),
        throttled_periods: m.get("cpu.stat", "nr_throttled"),
        throttled_time: m.get("cpu.stat", "throttled_time"),
        ..Throttle::default()
    };
    cgroups::metrics::Metrics {
        pids: MessageField::some(PidsStat {
            current: m.single("pids.current"),
            // Go's reader answers 0 for "max".
            limit: Some(m.single("pids.max"))
                .filter(|&max| max != u64::MAX)
                .unwrap_or(0),
            ..PidsStat::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage: MessageField::some(usage),
            throttling: MessageField::some(throttling),
            ..CPUStat::default()
        }),
        memory: MessageField::some(v1_memory(m)),
        blkio: MessageField::some(BlkIOStat {
            io_service_bytes_recursive: blkio(m, "blkio.throttle.io_service_bytes_recursive"),
            io_serviced_recursive: blkio(m, "blkio.throttle.io_serviced_recursive"),
            ..BlkIOStat::default()
        }),
        memory_oom_control: MessageField::some(MemoryOomControl {
            oom_kill_disable: m.get("memory.oom_control", "oom_kill_disable"),
            under_oom: m.get("memory.oom_control", "under_oom"),
            oom_kill: m.get("memory.oom_control", "oom_kill"),
            ..MemoryOomControl::default()
        }),
        ..cgroups::metrics::Metrics::default()
    }
}

fn v1_memory(m: &Metrics) -> cgroups::metrics::MemoryStat {
    use cgroups::metrics::{MemoryEntry, MemoryStat};
    let stat = |key: &str| m.get("memory.stat", key);
    let entry = |prefix: &str| {
        let number = |name: &str| m.single(&format!("memory.{prefix}{name}"));
        MessageField::some(MemoryEntry {
            limit: number("limit_in_bytes"),
            usage: number("usage_in_bytes"),
            max: number("max_usage_in_bytes"),
            failcnt: number("failcnt"),
            ..MemoryEntry::default()
        })
    };
    MemoryStat {
        cache: stat("cache"),
        rss: stat("rss"),
        rss_huge: stat("rss_huge"),
        mapped_file: stat("mapped_file"),
        dirty: stat("dirty"),
        writeback: stat("writeback"),
        pg_pg_in: stat("pgpgin"),
        pg_pg_out: stat("pgpgout"),
        pg_fault: stat("pgfault"),
        pg_maj_fault: stat("pgmajfault"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        hierarchical_memory_limit: stat("hierarchical_memory_limit"),
        hierarchical_swap_limit: stat("hierarchical_memsw_limit"),
        total_cache: stat("total_cache"),
        total_rss: stat("total_rss"),
        total_rss_huge: stat("total_rss_huge"),
        total_mapped_file: stat("total_mapped_file"),
        total_dirty: stat("total_dirty"),
        total_writeback: stat("total_writeback"),
        total_pg_pg_in: stat("total_pgpgin"),
        total_pg_pg_out: stat("total_pgpgout"),
        total_pg_fault: stat("total_pgfault"),
        total_pg_maj_fault: stat("total_pgmajfault"),
        total_inactive_anon: stat("total_inactive_anon"),
        total_active_anon: stat("total_active_anon"),
        total_inactive_file: stat("total_inactive_file"),
        total_active_file: stat("total_active_file"),
        total_unevictable: stat("total_unevictable"),
        usage: entry(""),
        swap: entry("memsw."),
        kernel: entry("kmem."),
        kernel_tcp: entry("kmem.tcp."),
        ..MemoryStat::default()
    }
}

fn blkio(m: &Metrics, file: &str) -> Vec<cgroups::metrics::BlkIOEntry> {
    let entry = |counter: &DeviceCounter| cgroups::metrics::BlkIOEntry {
        op: counter.operation.clone(),
        major: counter.major,
        minor: counter.minor,
        value: counter.value,
        ..cgroups::metrics::BlkIOEntry::default()
    };
    m.devices
        .iter()
        .filter(|counter| counter.file == file)
        .map(entry)
        .collect()
}

fn v2(m: &Metrics) -> cgroups_v2::metrics::Metrics {
    use cgroups_v2::metrics::{CPUStat, IOStat, MemoryEvents, PidsStat};
    let cpu = |key: &str| m.get("cpu.stat", key);
    let event = |key: &str| m.get("memory.events", key);
    cgroups_v2::metrics::Metrics {
        pids: MessageField::some(PidsStat {
            current: m.single("pids.current"),
            limit: m.single("pids.max"),
            ..PidsStat::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: cpu("usage_usec"),
            user_usec: cpu("user_usec"),
            system_usec: cpu("system_usec"),
            nr_periods: cpu("nr_periods"),
            nr_throttled: cpu("nr_throttled"),
            throttled_usec: cpu("throttled_usec"),
            ..CPUStat::default()
        }),
        memory: MessageField::some(v2_memory(m)),
        memory_events: MessageField::some(MemoryEvents {
            low: event("low"),
            high: event("high"),
            max: event("max"),
            oom: event("oom"),
            oom_kill: event("oom_kill"),
            ..MemoryEvents::default()
        }),
        io: MessageField::some(IOStat {
            usage: v2_io(m),
            ..IOStat::default()
        }),
        ..cgroups_v2::metrics::Metrics::default()
    }
}

fn v2_memory(m: &Metrics) -> cgroups_v2::metrics::MemoryStat {
    let stat = |key: &str| m.get("memory.stat", key);
    cgroups_v2::metrics::MemoryStat {
        anon: stat("anon"),
        file: stat("file"),
        kernel_stack: stat("kernel_stack"),
        slab: stat("slab"),
        sock: stat("sock"),
        shmem: stat("shmem"),
        file_mapped: stat("file_mapped"),
        file_dirty: stat("file_dirty"),
        file_writeback: stat("file_writeback"),
        anon_thp: stat("anon_thp"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        slab_reclaimable: stat("slab_reclaimable"),
        slab_unreclaimable: stat("slab_unreclaimable"),
        pgfault: stat("pgfault"),
        pgmajfault: stat("pgmajfault"),
        workingset_refault: stat("workingset_refault"),
        workingset_activate: stat("workingset_activate"),
        workingset_nodereclaim: stat("workingset_nodereclaim"),
        pgrefill: stat("pgrefill"),
        pgscan: stat("pgscan"),
        pgsteal: stat("pgsteal"),
        pgactivate: stat("pgactivate"),
        pgdeactivate: stat("pgdeactivate"),
        pglazyfree: stat("pglazyfree"),
        pglazyfreed: stat("pglazyfreed"),
        thp_fault_alloc: stat("thp_fault_alloc"),
        thp_collapse_alloc: stat("thp_collapse_alloc"),
        usage: m.single("memory.current"),
        usage_limit: m.single("memory.max"),
        swap_usage: m.single("memory.swap.current"),
        swap_limit: m.single("memory.swap.max"),
        ..cgroups_v2::metrics::MemoryStat::default()
    }
}

fn v2_io(m: &Metrics) -> Vec<cgroups_v2::metrics::IOEntry> {
    let mut entries: Vec<cgroups_v2::metrics::IOEntry> = Vec::new();
    for counter in m.devices.iter().filter(|counter| counter.file == "io.stat") {
        let known = entries
            .iter()
            .position(|entry| (entry.major, entry.minor) == (counter.major, counter.minor));
        let index = known.unwrap_or_else(|| {
            entries.push(cgroups_v2::metrics::IOEntry {
                major: counter.major,
                minor: counter.minor,
                ..cgroups_v2::metrics::IOEntry::default()
            });
            entries.len() - 1
        });
        let Some(entry) = entries.get_mut(index) else {
            continue;
        };
        match counter.operation.as_str() {
            "rbytes" => entry.rbytes = counter.value,
            "wbytes" => entry.wbytes = counter.value,
            "rios" => entry.rios = counter.value,
            "wios" => entry.wios = counter.value,
            _ => {}
        }
    }
    entries
}

//! `pod-costs`: what a pod costs in each way that a runtime handler can name it, for `cargo xtask
//! bench --pods`. The ways take turns, so that a machine that is busy for a while is busy for all.

mod kernel;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use embedshim_tests::{Cri, Namespaces, Pod};
use k8s_cri::v1::NamespaceMode;
use serde_json::{Value, json};
use testbed::image;
use testbed::releases::Release;
use testbed::sandbox::{EMBEDSHIM, Sandbox};

use kernel::KernelMemory;

/// What pods cost
#[derive(Debug, Parser)]
struct Options {
    /// Where embedshimd and the launcher are
    #[arg(long)]
    binaries: PathBuf,
    /// How many pods of each way are timed, in turns
    #[arg(long, default_value_t = 30)]
    rounds: usize,
    /// How many empty pods memory is measured with
    #[arg(long, default_value_t = 50)]
    pods: u32,
    /// How many pods of one container are started together; 0 for none
    #[arg(long, default_value_t = 110)]
    together: usize,
    /// Write everything that was found to this file
    #[arg(long)]
    json: Option<PathBuf>,
}

/// A way of making pods: the handler of the sandbox's containerd, and what the pod has of its own.
struct Way {
    name: &'static str,
    handler: &'static str,
    namespaces: Namespaces,
}

const WAYS: [Way; 4] = [
    Way {
        name: "podsandbox + runc.v2",
        handler: "runc-v2",
        namespaces: Namespaces::SIMPLE,
    },
    Way {
        name: "podsandbox + embedshim",
        handler: "path",
        namespaces: Namespaces::SIMPLE,
    },
    Way {
        name: "embedshim's controller",
        handler: "pauseless",
        namespaces: Namespaces::SIMPLE,
    },
    Way {
        name: "the same, shared processes",
        handler: "pauseless",
        namespaces: Namespaces {
            pid: NamespaceMode::Pod,
            ..Namespaces::SIMPLE
        },
    },
];
/// Until a process that was started or ended has its memory, or has none.
const SETTLE: Duration = Duration::from_secs(2);

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let image = tempfile::tempdir()?;
    let archive = image::build(image.path())?;
    // Left after everything else has ended.
    let kernel = KernelMemory::begin()?;
    let mut sandbox = Sandbox::new(&options.binaries, EMBEDSHIM)?;
    sandbox.use_programs(Release::Sid.programs()?);
    // Its own shim, which executes itself again.
    let shims = sandbox.directory().join("shims");
    fs::create_dir(&shims)?;
    let shim = Release::Sid.runc_v2().context("no shim of runc-v2")?;
    symlink(shim, shims.join("containerd-shim-runc-v2"))?;
    sandbox.use_shims(shims);
    sandbox.enable_sandboxer()?;
    sandbox.start_daemon()?;
    sandbox.start_containerd()?;
    sandbox.import_for_kubernetes(&archive)?;
    let mut cri = Cri::connect(&sandbox)?;
    println!(
        "containerd {}; medians of {} pods in turns",
        Release::Sid.version()?,
        options.rounds
    );
    println!(
        "{:28} {:>8} {:>8} {:>12} {:>10} {:>9} {:>9}",
        "", "run, ms", "stop, ms", "memory, kB", "kernel, kB", "processes", "together, s"
    );
    let times = times(&mut cri, options.rounds)?;
    let mut found = BTreeMap::new();
    for (way, [run, stop]) in WAYS.iter().zip(&times) {
        let usage = || Usage::now(&kernel, sandbox.namespace());
        let each = memory(&mut cri, way, options.pods, usage)?;
        let (memory, processes) = (each.kilobytes, each.processes);
        let together = match options.together {
            0 => None,
            count => Some(together(&sandbox, way, count)?),
        };
        let (run, stop) = (median(run), median(stop));
        let shown = together.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds:.1}"));
        println!(
            "{:28} {run:8.1} {stop:8.1} {memory:12.1} {:10.1} {processes:9.1} {shown:>9}",
            way.name, each.kernel_kilobytes
        );
        let of_way = json!({
            "run_ms": run, "stop_ms": stop, "memory_kb": memory,
            "kernel_memory_kb": each.kernel_kilobytes, "processes": processes,
            "together_s": together,
        });
        found.insert(way.name, of_way);
    }
    if let Some(file) = &options.json {
        let text = serde_json::to_string_pretty(&Value::from_iter(found))?;
        fs::write(file, text + "\n").with_context(|| file.display().to_string())?;
    }
    Ok(())
}

/// Of each way, the times of `RunPodSandbox` and of `StopPodSandbox`, in milliseconds.
fn times(cri: &mut Cri, rounds: usize) -> anyhow::Result<Vec<[Vec<f64>; 2]>> {
    let mut all: Vec<[Vec<f64>; 2]> = WAYS.iter().map(|_| <[Vec<f64>; 2]>::default()).collect();
    // The first of each says what is new, not what a pod costs.
    for round in 0..=rounds {
        for (way, [runs, stops]) in WAYS.iter().zip(&mut all) {
            let began = Instant::now();
            let pod = cri.run_pod(&format!("pod-{round}"), way.handler, way.namespaces)?;
            let runs_now = began.elapsed();
            let began = Instant::now();
            cri.stop_pod(&pod)?;
            let stops_now = began.elapsed();
            cri.remove_pod(&pod)?;
            if round > 0 {
                runs.push(runs_now.as_secs_f64() * 1e3);
                stops.push(stops_now.as_secs_f64() * 1e3);
            }
        }
    }
    Ok(all)
}

/// What an empty pod adds: proportional memory of all processes but containerd, memory of the
/// kernel, and processes.
fn memory(
    cri: &mut Cri,
    way: &Way,
    count: u32,
    usage: impl Fn() -> anyhow::Result<Usage>,
) -> anyhow::Result<Usage> {
    let before = usage()?;
    let pods: Vec<Pod> = (0..count)
        .map(|number| cri.run_pod(&format!("empty-{number}"), way.handler, way.namespaces))
        .collect::<anyhow::Result<_>>()?;
    std::thread::sleep(SETTLE);
    let with = usage()?;
    for pod in &pods {
        cri.remove_pod(pod)?;
    }
    std::thread::sleep(SETTLE);
    let per_pod = |with: f64, before: f64| (with - before) / f64::from(count);
    Ok(Usage {
        kilobytes: per_pod(with.kilobytes, before.kilobytes),
        kernel_kilobytes: per_pod(with.kernel_kilobytes, before.kernel_kilobytes),
        processes: per_pod(with.processes, before.processes),
    })
}

/// From the first request to the last container that runs, of pods that are started at once.
fn together(sandbox: &Sandbox, way: &Way, count: usize) -> anyhow::Result<f64> {
    let mut clients = (0..count)
        .map(|_| Cri::connect(sandbox))
        .collect::<anyhow::Result<Vec<Cri>>>()?;
    let began = Instant::now();
    let pods = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(&mut clients)
            .map(|(number, cri): (usize, _)| {
                scope.spawn(move || {
                    let pod = cri.run_pod(&format!("t-{number}"), way.handler, way.namespaces)?;
                    cri.run_container(&pod, &format!("c-{number}"), 0, &["sleep", "1000"])?;
                    anyhow::Ok(pod)
                })
            })
            .collect();
        let joined = threads.into_iter().map(|thread| {
            let joined = thread.join();
            joined.unwrap_or_else(|_| Err(anyhow::anyhow!("a client panicked")))
        });
        joined.collect::<anyhow::Result<Vec<Pod>>>()
    })?;
    let took = began.elapsed().as_secs_f64();
    for (pod, cri) in pods.iter().zip(&mut clients) {
        cri.remove_pod(pod)?;
    }
    Ok(took)
}

/// What processes use.
struct Usage {
    kilobytes: f64,
    kernel_kilobytes: f64,
    processes: f64,
}

impl Usage {
    /// Of all processes but containerd and this one; what the kernel uses for all of them.
    fn now(kernel: &KernelMemory, pods: &str) -> anyhow::Result<Self> {
        let own = std::process::id().to_string();
        let mut usage = Self {
            kilobytes: 0.0,
            kernel_kilobytes: kernel.kilobytes(pods)?,
            processes: 0.0,
        };
        for entry in fs::read_dir("/proc")?.flatten() {
            let name = entry.file_name();
            let is_process = name
                .to_string_lossy()
                .bytes()
                .all(|byte| byte.is_ascii_digit());
            if !is_process || name == own.as_str() || is_containerd(&entry.path()) {
                continue;
            }
            // Of kernel threads, and of what has ended meanwhile, there is none.
            let Some(kilobytes) = proportional(&entry.path()) else {
                continue;
            };
            usage.kilobytes += kilobytes;
            usage.processes += 1.0;
        }
        Ok(usage)
    }
}

fn is_containerd(process: &Path) -> bool {
    fs::read_to_string(process.join("comm")).is_ok_and(|name| name.trim() == "containerd")
}

fn proportional(process: &Path) -> Option<f64> {
    let text = fs::read_to_string(process.join("smaps_rollup")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

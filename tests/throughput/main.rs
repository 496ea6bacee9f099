//! `throughput`: how fast a process's output reaches its client, and what that costs, with our
//! daemon and with containerd's own shim in turn. For `cargo xtask bench`, which builds the
//! binaries it measures. Speaks the shim API itself, since ctr would be the bottleneck.
#![allow(
    clippy::indexing_slicing,
    reason = "a measurement that is wrong fails by panicking"
)]

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use containerd_shim_protos::api;
use embedshim_tests::{Bundle, Shim};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use testbed::releases::Release;
use testbed::sandbox::{EMBEDSHIM, RUNC_V2, Sandbox, clean_up_all, clean_up_on_signals};

/// Measures the throughput of output and the processor time that a shim takes for it
#[derive(Debug, Parser)]
struct Options {
    /// Directory of the binaries
    binaries: PathBuf,
    /// How much a process writes, in MiB; a tenth of it to a terminal
    #[arg(long, default_value_t = 1024)]
    mebibytes: u32,
    /// How often, with each shim in turn
    #[arg(long, default_value_t = 3)]
    runs: u32,
}

/// Where the output goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Fifo,
    File,
    Terminal,
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
struct Measured {
    took: Duration,
    processor: Duration,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    clean_up_on_signals()?;
    let result = measure(&options);
    clean_up_all();
    result
}

fn measure(options: &Options) -> anyhow::Result<()> {
    let ours = Sandbox::new(&options.binaries, EMBEDSHIM)?;
    ours.start_daemon()?;
    let theirs = Sandbox::new(&options.binaries, RUNC_V2)?;
    println!(
        "output of a process, median of {}: MiB/s, and processor time of the shim",
        options.runs
    );
    println!("              embed.v1               runc.v2                ratio");
    for way in [Way::Fifo, Way::File, Way::Terminal] {
        let amount = match way {
            Way::Terminal => options.mebibytes.div_ceil(10),
            _ => options.mebibytes,
        };
        let mut measured = [Vec::new(), Vec::new()];
        for run in 0..options.runs {
            for (sandbox, measured) in [&theirs, &ours].into_iter().zip(&mut measured) {
                let id = format!("{way:?}{run}").to_lowercase();
                let one = run_one(sandbox, &id, way, amount);
                measured.push(one.with_context(|| format!("{way:?}, {}", sandbox.runtime()))?);
            }
        }
        let [theirs, ours] = measured.map(median);
        let speed = |measured: Measured| f64::from(amount) / measured.took.as_secs_f64();
        println!(
            "  {:8}  {:7.0} MiB/s {:6.0} ms  {:7.0} MiB/s {:6.0} ms  {:5.2} speed {:5.2} time",
            format!("{way:?}").to_lowercase(),
            speed(ours),
            ours.processor.as_secs_f64() * 1000.0,
            speed(theirs),
            theirs.processor.as_secs_f64() * 1000.0,
            speed(ours) / speed(theirs),
            ours.processor.as_secs_f64() / theirs.processor.as_secs_f64(),
        );
    }
    Ok(())
}

fn median(mut measured: Vec<Measured>) -> Measured {
    measured.sort_unstable_by_key(|measured| measured.took);
    measured[measured.len() / 2]
}

fn run_one(sandbox: &Sandbox, id: &str, way: Way, amount: u32) -> anyhow::Result<Measured> {
    let script = format!("busybox dd if=/dev/zero bs=1M count={amount} 2>/dev/null");
    let bundle = Bundle::new(sandbox, id, &["sh", "-c", &script])?;
    let (shim, process) = connect(sandbox, id, &bundle)?;
    let target = sandbox.directory().join(format!("{id}.out"));
    if way == Way::Terminal {
        bundle.edit(|spec| spec["process"]["terminal"] = true.into())?;
    }
    if way != Way::File {
        mkfifo(&target, Mode::S_IRWXU)?;
    }
    let complaints = sandbox.directory().join(format!("{id}.err"));
    if way == Way::Fifo {
        mkfifo(&complaints, Mode::S_IRWXU)?;
        let path = complaints.clone();
        std::thread::spawn(move || read_to_the_end(&path));
    }
    let path = target.clone();
    let reader = (way != Way::File).then(|| std::thread::spawn(move || read_to_the_end(&path)));
    shim.create_with(id, bundle.path(), |request| {
        request.terminal = way == Way::Terminal;
        request.stdout = match way {
            Way::File => format!("file://{}", target.display()),
            _ => target.display().to_string(),
        };
        request.stderr = match way {
            Way::Fifo => complaints.display().to_string(),
            Way::File => request.stdout.clone(),
            Way::Terminal => String::new(),
        };
    })?;
    let before = processor_time(process)?;
    let began = Instant::now();
    shim.start(id)?;
    shim.wait(id)?;
    let expected = u64::from(amount) << 20;
    let arrived = if let Some(reader) = reader {
        reader.join().map_err(|_| anyhow::anyhow!("reader"))??
    } else {
        while fs::metadata(&target)?.len() < expected {
            std::thread::sleep(Duration::from_millis(1));
        }
        expected
    };
    let took = began.elapsed();
    ensure!(arrived == expected, "{arrived} of {expected} bytes");
    let processor = processor_time(process)?.saturating_sub(before);
    shim.delete(id)?;
    fs::remove_file(&target)?;
    Ok(Measured { took, processor })
}

/// As Go does: to the first read of nothing.
fn read_to_the_end(path: &Path) -> anyhow::Result<u64> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    let mut sum = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(sum),
            count => sum += count as u64,
        }
    }
}

/// The shim of a container, and its process: the daemon, or one that is started for it.
fn connect(sandbox: &Sandbox, id: &str, bundle: &Bundle) -> anyhow::Result<(Shim, i32)> {
    if sandbox.runtime() == EMBEDSHIM {
        let daemon = sandbox.daemon_pid().context("no daemon")?;
        return Ok((Shim::connect(sandbox)?, daemon));
    }
    // Its log, which containerd reads: it fits into a fifo that is open.
    let log = bundle.path().join("log");
    mkfifo(&log, Mode::S_IRWXU)?;
    std::mem::forget(File::options().read(true).write(true).open(log)?);
    let started = Command::new(programs()?.join("containerd-shim-runc-v2"))
        .args(["-namespace", sandbox.namespace(), "-id", id])
        .args(["-address", "/nonexistent", "start"])
        .current_dir(bundle.path())
        .env("TTRPC_ADDRESS", "/nonexistent")
        .output()
        .context("containerd-shim-runc-v2")?;
    let complaint = String::from_utf8_lossy(&started.stderr);
    ensure!(
        started.status.success(),
        "containerd-shim-runc-v2: {complaint}"
    );
    let answer: serde_json::Value = serde_json::from_slice(&started.stdout)?;
    let address = answer["address"].as_str().context("no address")?;
    let shim = Shim::at_address(address, sandbox.namespace())?;
    let request = api::ConnectRequest {
        id: id.into(),
        ..api::ConnectRequest::default()
    };
    let connected = shim.tasks.connect(shim.metadata(), &request)?;
    Ok((shim, i32::try_from(connected.shim_pid)?))
}

/// User and system time of all threads, those that have ended as well.
fn processor_time(pid: i32) -> anyhow::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let ticks = |index: usize| {
        fields
            .get(index)
            .and_then(|field| field.parse::<u64>().ok())
    };
    let sum = ticks(11).zip(ticks(12)).map(|(user, system)| user + system);
    // USER_HZ is 100 on every architecture that we run on.
    Ok(Duration::from_millis(sum.context("no times")? * 10))
}

/// Of the newest release: its shim speaks the same version of the API. It starts itself again, and
/// so has to be run as it is.
fn programs() -> anyhow::Result<PathBuf> {
    let wrapped = Release::Sid.programs()?.context("no newer containerd")?;
    Ok(wrapped.with_file_name("root/usr/bin"))
}

//! How fast a process's output reaches its client, by a fifo, a file and a terminal, and what that
//! costs the shim. The floor is the same program without container and shim, its output going
//! straight to the target: it bounds what a shim can do with a terminal, but no fifo, since a
//! shim's can hold more than the 64 KiB of this one.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure};
use nix::errno::Errno;
use nix::pty::openpty;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::json;

use super::Bench;
use crate::client::PATIENCE;
use crate::process::processor_time;
use crate::report::{FLOOR, OURS, Unit};
use crate::subject::Shim;
use crate::subject::spawn::finish;

/// How long Create may take.
const CREATION: Duration = Duration::from_secs(5);

/// Where output goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Fifo,
    File,
    Terminal,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Fifo => "fifo",
            Self::File => "file",
            Self::Terminal => "terminal",
        }
    }
}

pub(super) fn measure(bench: &mut Bench<'_>) -> anyhow::Result<()> {
    let mebibytes: u32 = if bench.is_short() { 128 } else { 512 };
    // Not every shim knows every way; one that does not answer is not asked again.
    let mut refused = Vec::new();
    for round in 0..bench.rounds(5, 2).min(5) {
        if bench.is_late(round, 1) {
            break;
        }
        for way in [Way::Fifo, Way::File, Way::Terminal] {
            let amount = match way {
                Way::Terminal => mebibytes / 8,
                _ => mebibytes,
            };
            for subject in bench.in_turn(round) {
                match subject.shim() {
                    Some(shim) if refused.contains(&(shim.name(), way)) => {}
                    Some(shim) => match by_shim(bench, shim, way, amount) {
                        Err(error) if shim.name() != OURS => {
                            println!("  {}, {}: {error:#}", shim.name(), way.name());
                            refused.push((shim.name(), way));
                        }
                        done => done?,
                    },
                    None if subject.name() == FLOOR => without(bench, way, amount)?,
                    None => {}
                }
            }
        }
    }
    Ok(())
}

fn by_shim(bench: &mut Bench<'_>, shim: &Shim, way: Way, amount: u32) -> anyhow::Result<()> {
    let id = bench.id();
    let bundle = bench.ground.bundle_with(&id, |spec| {
        for (pointer, value) in [
            ("/process/args", json!(arguments("busybox", amount))),
            ("/process/terminal", json!(way == Way::Terminal)),
        ] {
            if let Some(place) = spec.pointer_mut(pointer) {
                *place = value;
            }
        }
    })?;
    let target = bench.ground.directory().join(format!("{id}.out"));
    // An older shim takes both outputs or none; nothing comes by this one.
    let complaints = bench.ground.directory().join(format!("{id}.err"));
    let reader = reader(way, &target)?;
    if way == Way::Fifo {
        // Its thread ends with the last writer.
        self::reader(way, &complaints)?;
    }
    let mut container = shim.launch(bench.ground, &id, bundle)?;
    // The Rust shim 0.2 does not answer to a log file.
    container.set_patience(CREATION)?;
    container.create(|request| {
        request.terminal = way == Way::Terminal;
        request.stdout = match way {
            Way::File => format!("file://{}", target.display()),
            _ => target.display().to_string(),
        };
        request.stderr = match way {
            Way::File => request.stdout.clone(),
            Way::Fifo => complaints.display().to_string(),
            Way::Terminal => String::new(),
        };
    })?;
    container.set_patience(PATIENCE)?;
    let pid = i32::try_from(container.shim_pid()?)?;
    let before = processor_time(pid)?;
    let began = Instant::now();
    container.start()?;
    container.wait()?;
    arrived(reader, &target, amount)?;
    let took = began.elapsed();
    let processor = processor_time(pid)?.saturating_sub(before);
    container.delete()?;
    container.clean_up()?.remove()?;
    fs::remove_file(&target)?;
    let _ = fs::remove_file(&complaints);
    record(bench, shim.name(), way, amount, took);
    let name = format!("output/processor time for 1 GiB/{}", way.name());
    bench.time(&name, None, shim.name(), processor * 1024 / amount);
    Ok(())
}

fn without(bench: &mut Bench<'_>, way: Way, amount: u32) -> anyhow::Result<()> {
    let id = bench.id();
    let target = bench.ground.directory().join(format!("{id}.out"));
    let program = bench.ground.directory().join("rootfs/bin/busybox");
    let (output, reader) = if way == Way::Terminal {
        let pty = openpty(None, None)?;
        let master = File::from(pty.master);
        (File::from(pty.slave), Some(spawn(move || read_all(master))))
    } else {
        let reader = reader(way, &target)?;
        let mut options = File::options();
        let options = options.create(way == Way::File).append(true);
        (options.open(&target)?, reader)
    };
    let mut command = Command::new(program);
    let words = arguments("dd", amount);
    command.args(words.iter().skip(1)).stdin(Stdio::null());
    command.stdout(output).stderr(Stdio::null());
    let began = Instant::now();
    let child = command.spawn()?;
    // The reader sees its end when the last writer is gone.
    drop(command);
    finish(child)?;
    arrived(reader, &target, amount)?;
    record(bench, FLOOR, way, amount, began.elapsed());
    let _ = fs::remove_file(&target);
    Ok(())
}

/// `dd` by busybox, by one of its names.
fn arguments(name: &str, amount: u32) -> Vec<String> {
    let count = format!("count={amount}");
    let words = [name, "dd", "if=/dev/zero", "bs=1M", &count, "status=none"];
    words.iter().map(ToString::to_string).collect()
}

type Reader = Option<JoinHandle<anyhow::Result<u64>>>;

/// What reads the target, unless it is a file.
fn reader(way: Way, target: &Path) -> anyhow::Result<Reader> {
    if way == Way::File {
        return Ok(None);
    }
    mkfifo(target, Mode::S_IRWXU)?;
    let path: PathBuf = target.into();
    Ok(Some(spawn(move || read_all(File::open(path)?))))
}

/// Waits until all bytes have arrived, and no more.
fn arrived(reader: Reader, target: &Path, amount: u32) -> anyhow::Result<()> {
    let expected = u64::from(amount) << 20;
    let count = if let Some(reader) = reader {
        reader
            .join()
            .map_err(|_| anyhow!("the reader panicked"))??
    } else {
        let deadline = Instant::now() + PATIENCE;
        while fs::metadata(target)?.len() < expected && Instant::now() < deadline {
            sleep(Duration::from_millis(1));
        }
        fs::metadata(target)?.len()
    };
    ensure!(count == expected, "{count} of {expected} bytes arrived");
    Ok(())
}

fn read_all(mut file: File) -> anyhow::Result<u64> {
    let mut buffer = vec![0; 1 << 20];
    let mut sum = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(sum),
            Ok(count) => sum += count as u64,
            // What a terminal's master says when its last user is gone.
            Err(error) if error.raw_os_error() == Some(Errno::EIO as i32) => return Ok(sum),
            Err(error) => return Err(error.into()),
        }
    }
}

fn record(bench: &mut Bench<'_>, subject: &str, way: Way, amount: u32, took: Duration) {
    let speed = f64::from(amount) / took.as_secs_f64();
    let name = format!("output/{}", way.name());
    bench
        .recorder
        .record(&name, subject, Unit::MebibytesPerSecond, speed);
}

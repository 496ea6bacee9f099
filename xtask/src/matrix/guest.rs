//! One boot: a kernel, an initramfs, a console that is read to its end.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use testbed::architecture::Architecture;

const PAUSE: Duration = Duration::from_millis(100);

/// What the guest has printed; an error if it did not come to its end in time.
#[derive(Debug)]
pub(crate) struct Console {
    pub(crate) text: String,
    pub(crate) end: anyhow::Result<()>,
}

/// A machine that QEMU emulates: what is different from one architecture to another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine {
    emulator: &'static str,
    arguments: &'static [&'static str],
    console: &'static str,
}

impl Machine {
    /// The one of this architecture.
    pub(crate) fn of(architecture: Architecture) -> Self {
        match architecture {
            Architecture::X86_64 => Self {
                emulator: "qemu-system-x86_64",
                arguments: &["-cpu", "max"],
                console: "ttyS0",
            },
            // Signed pointers by the processor's own algorithm take most of the time.
            Architecture::Aarch64 => Self {
                emulator: "qemu-system-aarch64",
                arguments: &["-machine", "virt", "-cpu", "max,pauth-impdef=on"],
                console: "ttyAMA0",
            },
        }
    }
}

/// Boots with these arguments to the kernel, shows each line as it comes, and waits for the end.
pub(crate) fn run(
    machine: Machine,
    kernel: &Path,
    initramfs: &Path,
    arguments: &str,
    limit: Duration,
    show: fn(&str),
) -> Console {
    let mut text = String::new();
    let end = boot(machine, kernel, initramfs, arguments)
        .and_then(|mut guest| watch(&mut guest, limit, show, &mut text));
    Console { text, end }
}

fn boot(
    machine: Machine,
    kernel: &Path,
    initramfs: &Path,
    arguments: &str,
) -> anyhow::Result<Child> {
    let Machine {
        emulator, console, ..
    } = machine;
    // Emulated: /dev/kvm exists on machines where it does not work, and a hanging guest is worse
    // than a slow one. By one thread: with one for each processor the kernel dies when it patches
    // its code (a tracepoint's call) under another's feet.
    let command_line =
        format!("console={console} quiet loglevel=1 panic=-1 rdinit=/init {arguments}");
    Command::new(emulator)
        .args(["-accel", "tcg,thread=single", "-smp", "2", "-m", "2048"])
        .args(machine.arguments)
        .args([
            "-display",
            "none",
            "-serial",
            "stdio",
            "-monitor",
            "none",
            "-no-reboot",
            "-nodefaults",
        ])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", &command_line])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .with_context(|| format!("cannot run {emulator}"))
}

fn watch(
    guest: &mut Child,
    limit: Duration,
    show: fn(&str),
    text: &mut String,
) -> anyhow::Result<()> {
    let mut output = BufReader::new(guest.stdout.take().context("no console")?);
    let reader = thread::spawn(move || {
        let (mut text, mut bytes) = (String::new(), Vec::new());
        // What was read until an error is what there is.
        while output
            .read_until(b'\n', &mut bytes)
            .is_ok_and(|read| read > 0)
        {
            let line = String::from_utf8_lossy(&bytes).replace('\r', "");
            show(line.trim_end());
            text.push_str(&line);
            bytes.clear();
        }
        text
    });
    let give_up = Instant::now() + limit;
    let ended = loop {
        if guest.try_wait()?.is_some() {
            break true;
        }
        if Instant::now() > give_up {
            guest.kill()?;
            guest.wait()?;
            break false;
        }
        thread::sleep(PAUSE);
    };
    *text = reader.join().unwrap_or_default();
    if !ended {
        bail!("it was not done after {} s", limit.as_secs());
    }
    if !text.contains("=== all done") {
        bail!("it ended before its time");
    }
    Ok(())
}

//! One boot: a kernel, an initramfs, a console that is read to its end.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

const PAUSE: Duration = Duration::from_millis(100);

/// What the guest has printed; an error if it did not come to its end in time.
#[derive(Debug)]
pub(crate) struct Console {
    pub(crate) text: String,
    pub(crate) end: anyhow::Result<()>,
}

/// Boots with these arguments to the kernel, shows each line as it comes, and waits for the end.
pub(crate) fn run(
    kernel: &Path,
    initramfs: &Path,
    arguments: &str,
    limit: Duration,
    show: fn(&str),
) -> Console {
    let mut text = String::new();
    let end = boot(kernel, initramfs, arguments)
        .and_then(|mut guest| watch(&mut guest, limit, show, &mut text));
    Console { text, end }
}

fn boot(kernel: &Path, initramfs: &Path, arguments: &str) -> anyhow::Result<Child> {
    // Emulated: /dev/kvm exists on machines where it does not work, and a hanging guest is worse
    // than a slow one. By one thread: with one for each processor the kernel dies when it patches
    // its code (a tracepoint's call) under another's feet.
    let command_line = format!("console=ttyS0 quiet loglevel=1 panic=-1 rdinit=/init {arguments}");
    Command::new("qemu-system-x86_64")
        .args([
            "-accel",
            "tcg,thread=single",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            "2048",
        ])
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
        .context("cannot run qemu-system-x86_64")
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

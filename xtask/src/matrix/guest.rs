//! One boot: a kernel, an initramfs, a console that is read to its end.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

const PAUSE: Duration = Duration::from_millis(100);

/// What the guest has printed; an error if it did not come to its end in time.
#[derive(Debug)]
pub(super) struct Console {
    pub(super) text: String,
    pub(super) end: anyhow::Result<()>,
}

/// Boots and waits for the end.
pub(super) fn run(
    kernel: &Path,
    initramfs: &Path,
    filter: Option<&str>,
    limit: Duration,
) -> Console {
    let mut text = String::new();
    let end =
        boot(kernel, initramfs, filter).and_then(|mut guest| watch(&mut guest, limit, &mut text));
    Console { text, end }
}

fn boot(kernel: &Path, initramfs: &Path, filter: Option<&str>) -> anyhow::Result<Child> {
    // Emulated: /dev/kvm exists on machines where it does not work, and a hanging guest is worse than a slow one. By one thread:
    // with one for each processor the kernel dies when it patches its code (a tracepoint's call) under another's feet.
    let command_line = format!(
        "console=ttyS0 quiet loglevel=1 panic=-1 rdinit=/init embedshim.filter={}",
        filter.unwrap_or_default()
    );
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

fn watch(guest: &mut Child, limit: Duration, text: &mut String) -> anyhow::Result<()> {
    let mut output = guest.stdout.take().context("no console")?;
    let reader = thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read until an error is what there is.
        let _ = output.read_to_end(&mut bytes);
        bytes
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
    let bytes = reader.join().unwrap_or_default();
    *text = String::from_utf8_lossy(&bytes).replace('\r', "");
    if !ended {
        bail!("it was not done after {} s", limit.as_secs());
    }
    if !text.contains("=== all done") {
        bail!("it ended before its time");
    }
    Ok(())
}

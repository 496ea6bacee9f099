//! Running programs to their end with a deadline, without looking at intervals, which would be
//! measured too: what is waited for is a pidfd or the end of a pipe.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::client::PATIENCE;

/// Runs a program that has to succeed and prints nothing.
pub(crate) fn succeed(command: &mut Command) -> anyhow::Result<()> {
    command.stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn().with_context(|| format!("{command:?}"))?;
    finish(child).with_context(|| format!("{command:?}"))
}

/// Runs a program that has to succeed, and returns what it printed on both of its outputs.
pub(crate) fn capture(command: &mut Command) -> anyhow::Result<Vec<u8>> {
    let shown = format!("{command:?}");
    let (mut reader, writer) = std::io::pipe()?;
    command.stdin(Stdio::null());
    command.stdout(writer.try_clone()?).stderr(writer);
    let child = command.spawn().with_context(|| shown.clone())?;
    // Or else the pipe would have no end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let deadline = Instant::now() + PATIENCE;
    let (mut said, mut part) = (Vec::new(), [0; 4096]);
    loop {
        wait_for(&reader, PollFlags::POLLIN, deadline).with_context(|| shown.clone())?;
        match reader.read(&mut part)? {
            0 => break,
            count => said.extend_from_slice(part.get(..count).unwrap_or_default()),
        }
    }
    let ended = finish(child);
    ended.with_context(|| format!("{shown} said: {}", String::from_utf8_lossy(&said)))?;
    Ok(said)
}

/// Waits for a child that has to succeed.
pub(crate) fn finish(mut child: Child) -> anyhow::Result<()> {
    let number = i32::try_from(child.id())?;
    if let Some(pidfd) = open(number)?
        && let Err(error) = wait_for(&pidfd, PollFlags::POLLIN, Instant::now() + PATIENCE)
    {
        child.kill()?;
        child.wait()?;
        return Err(error);
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("{status}");
    }
    Ok(())
}

/// A process that the bench may not be the parent of; none if it is gone.
pub(crate) fn open(number: i32) -> anyhow::Result<Option<OwnedFd>> {
    let number = Pid::from_raw(number).context("no process has this number")?;
    match pidfd_open(number, PidfdFlags::empty()) {
        Ok(pidfd) => Ok(Some(pidfd)),
        Err(rustix::io::Errno::SRCH) => Ok(None),
        Err(error) => Err(error).context("pidfd_open"),
    }
}

/// Waits until a process has ended.
pub(crate) fn wait_for_end(pidfd: &OwnedFd) -> anyhow::Result<()> {
    wait_for(pidfd, PollFlags::POLLIN, Instant::now() + PATIENCE)
}

fn wait_for(what: &impl AsFd, events: PollFlags, deadline: Instant) -> anyhow::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    let left = PollTimeout::try_from(left.max(Duration::from_millis(1)))?;
    let mut polled = [PollFd::new(what.as_fd(), events)];
    if poll(&mut polled, left)? == 0 {
        bail!("it did not end within {} s", PATIENCE.as_secs());
    }
    Ok(())
}

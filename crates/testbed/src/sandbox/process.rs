//! [`Running`]: a child process whose output is read while it runs and whose end is waited for with
//! a limit. It is killed when it is dropped.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

/// A child process.
#[derive(Debug)]
pub struct Running {
    child: Child,
    name: String,
    stdout: Option<JoinHandle<String>>,
    stderr: Option<JoinHandle<String>>,
}

/// How it ended.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Its exit code; none if a signal killed it.
    pub code: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
}

impl Running {
    /// Starts a command with the streams it has.
    pub fn spawn(command: &mut Command) -> anyhow::Result<Self> {
        let name = format!("{command:?}");
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot run {name}"))?;
        let stdout = child.stdout.take().map(collect);
        let stderr = child.stderr.take().map(collect);
        Ok(Self {
            child,
            name,
            stdout,
            stderr,
        })
    }

    /// Starts a command and keeps what it prints.
    pub fn capture(command: &mut Command) -> anyhow::Result<Self> {
        Self::spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()))
    }

    /// Lets it run on by itself.
    pub fn leave(self) {
        // The child's own drop does nothing; ours would kill it.
        std::mem::forget(self);
    }

    /// Its pid.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap_or(i32::MAX)
    }

    /// Signals it.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        nix::sys::signal::kill(Pid::from_raw(self.pid()), signal)
            .with_context(|| format!("cannot signal {}", self.name))
    }

    /// Writes to its input and closes it.
    pub fn feed(&mut self, input: &[u8]) -> anyhow::Result<()> {
        let mut stdin = self.child.stdin.take().context("its input is not a pipe")?;
        stdin
            .write_all(input)
            .with_context(|| format!("cannot write to {}", self.name))
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for its end; kills it at the limit, which is an error.
    pub fn finish(&mut self, limit: Duration) -> anyhow::Result<Finished> {
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() >= deadline {
                self.child.kill()?;
                self.child.wait()?;
                let said = format!("{}{}", self.output(), self.errors());
                bail!(
                    "{} did not end within {} s; it had said: {said}",
                    self.name,
                    limit.as_secs()
                );
            }
            sleep(Duration::from_millis(3));
        };
        Ok(Finished {
            code: status.code(),
            stdout: self.output(),
            stderr: self.errors(),
        })
    }

    fn output(&mut self) -> String {
        self.stdout
            .take()
            .and_then(|reader| reader.join().ok())
            .unwrap_or_default()
    }

    fn errors(&mut self) -> String {
        self.stderr
            .take()
            .and_then(|reader| reader.join().ok())
            .unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn collect(mut stream: impl Read + Send + 'static) -> JoinHandle<String> {
    spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

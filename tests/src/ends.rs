//! [`Reader`] and [`Terminal`]: a client's ends of streams, as Go's clients have them. `read() ==
//! 0` is the end of a stream: a client never reads on.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, ensure};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use testbed::sandbox::{Sandbox, until};

/// The reader of a fifo that it has made. It opens the fifo in the background, as containerd's fifo
/// package does, and reads to the first end.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    read: Arc<Mutex<Vec<u8>>>,
    thread: Option<JoinHandle<std::io::Result<()>>>,
}

impl Reader {
    /// Makes a fifo of this name in the sandbox's directory, and reads it.
    pub fn new(sandbox: &Sandbox, name: &str) -> anyhow::Result<Self> {
        let path = sandbox.directory().join(name);
        mkfifo(&path, Mode::S_IRWXU).with_context(|| path.display().to_string())?;
        Ok(Self::of(path))
    }

    /// Reads a fifo that is there.
    pub fn of(path: PathBuf) -> Self {
        let read = Arc::new(Mutex::new(Vec::new()));
        let (file, into) = (path.clone(), Arc::clone(&read));
        let thread = std::thread::spawn(move || read_to_the_end(&file, &into));
        Self {
            path,
            read,
            thread: Some(thread),
        }
    }

    /// The path, for a request.
    pub fn path(&self) -> String {
        self.path.display().to_string()
    }

    /// What has come so far.
    pub fn text(&self) -> String {
        let read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&read).into_owned()
    }

    /// Waits until this text has come.
    pub fn wait_for(&self, text: &str) -> anyhow::Result<()> {
        until(&format!("{text:?} comes"), || {
            Ok(self.text().contains(text))
        })
        .with_context(|| self.tail())
    }

    /// Whether the stream has ended.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the end of the stream and returns all of it.
    pub fn finish(&mut self) -> anyhow::Result<String> {
        until("the stream ends", || Ok(self.has_ended())).with_context(|| self.tail())?;
        if let Some(thread) = self.thread.take() {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        }
        Ok(self.text())
    }

    fn tail(&self) -> String {
        let text = self.text();
        let start = text.len().saturating_sub(200);
        let tail = text.get(start..).unwrap_or(&text);
        format!("{} bytes have come, the last are {tail:?}", text.len())
    }
}

fn read_to_the_end(path: &Path, into: &Mutex<Vec<u8>>) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let mut piece = vec![0; 64 << 10];
    loop {
        let count = file.read(&mut piece)?;
        if count == 0 {
            return Ok(());
        }
        into.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(piece.get(..count).unwrap_or_default());
    }
}

/// Makes a fifo and opens its writing end, as the client of an input has it.
pub fn writer(sandbox: &Sandbox, name: &str) -> anyhow::Result<(PathBuf, File)> {
    let path = sandbox.directory().join(name);
    mkfifo(&path, Mode::S_IRWXU)?;
    // Opening must not wait for the shim: the reading end of this one is gone when it returns.
    let reader = OpenOptions::new().read(true).write(true).open(&path)?;
    let file = OpenOptions::new().write(true).open(&path)?;
    drop(reader);
    Ok((path, file))
}

/// Runs a command on a terminal of its own (`script`), which stays open until the command ends.
pub fn on_a_terminal(command: &Command) -> Command {
    let quote =
        |word: &std::ffi::OsStr| format!("'{}'", word.to_string_lossy().replace('\'', "'\\''"));
    let words: Vec<String> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(quote)
        .collect();
    let mut script = Command::new("script");
    let variables = command.get_envs();
    script
        .envs(variables.filter_map(|(name, value)| Some((name, value?))))
        .args(["--quiet", "--return", "--flush", "--command"])
        .arg(words.join(" "))
        .arg("/dev/null")
        .stdin(Stdio::piped());
    script
}

/// Demands that a text is the lines `word 1` to `word LAST`, each once and in order.
pub fn ensure_counted(text: &str, word: &str, last: usize) -> anyhow::Result<()> {
    let found: Vec<&str> = text
        .lines()
        .filter_map(|line| line.trim_end().strip_prefix(word)?.strip_prefix(' '))
        .collect();
    let is_whole = found
        .iter()
        .copied()
        .eq((1..=last).map(|number| number.to_string()));
    ensure!(
        is_whole,
        "{} of {last} lines came, the last is {:?}",
        found.len(),
        found.last()
    );
    Ok(())
}

//! [`ClientStreams`]: the client's ends of one process's streams, and whether they have brought
//! what is due. Each stream is in the ledger: how much came, and that each number came once and in
//! order.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, bail, ensure};
use embedshim_core::stdio::StdioPaths;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use testbed::sandbox::until;

use crate::fifo::{Reader, Writer};
use crate::ground::Ground;
use crate::logger;
use crate::plan::{ProcessPlan, Sink};
use crate::program::{Output, Program};
use crate::sequence::Due;

/// Where the client finds what came.
#[derive(Debug)]
enum End {
    Fifo(Reader),
    /// The files of loggers whose names begin like this, and how those of this output end.
    Logged(PathBuf, &'static str),
    File(PathBuf),
}

/// The client's ends of one process's streams.
#[derive(Debug)]
pub(crate) struct ClientStreams<'a> {
    ground: &'a Ground,
    name: String,
    plan: ProcessPlan,
    paths: StdioPaths,
    outputs: Vec<(Output, End)>,
    writer: Mutex<Option<Writer>>,
}

impl<'a> ClientStreams<'a> {
    /// Makes fifos in the bundle, and begins to read them.
    pub(crate) fn open(
        ground: &'a Ground,
        id: &str,
        exec: &str,
        plan: &ProcessPlan,
    ) -> anyhow::Result<Self> {
        let own = if exec.is_empty() { "init" } else { exec };
        Self::open_as(ground, id, exec, own, plan)
    }

    /// Those of the init for another attempt to create it.
    pub(crate) fn open_again(
        ground: &'a Ground,
        id: &str,
        attempt: u64,
        plan: &ProcessPlan,
    ) -> anyhow::Result<Self> {
        Self::open_as(ground, id, "", &format!("init-{attempt}"), plan)
    }

    fn open_as(
        ground: &'a Ground,
        id: &str,
        exec: &str,
        own: &str,
        plan: &ProcessPlan,
    ) -> anyhow::Result<Self> {
        let directory = ground.bundles.path(id).join("streams");
        fs::create_dir_all(&directory)?;
        let own = directory.join(own);
        let mut streams = Self {
            ground,
            name: format!("{id} {exec}").trim_end().to_owned(),
            plan: *plan,
            paths: StdioPaths {
                terminal: plan.streams.terminal,
                ..StdioPaths::default()
            },
            outputs: Vec::new(),
            writer: Mutex::default(),
        };
        streams.open_input(&own)?;
        match plan.streams.sink {
            Sink::Fifo => streams.open_fifos(&own)?,
            Sink::Logger => {
                streams.paths.stdout = ground.bundles.logger.uri(&own);
                for (output, suffix) in streams.wanted([".out", ".err"]) {
                    let end = End::Logged(own.clone(), suffix);
                    streams.outputs.push((output, end));
                }
            }
            Sink::File => {
                let file = own.with_extension("log");
                streams.paths.stdout = format!("file://{}", file.display());
                streams.outputs.push((Output::Both, End::File(file)));
            }
        }
        Ok(streams)
    }

    /// What a request says of them.
    pub(crate) fn paths(&self) -> StdioPaths {
        self.paths.clone()
    }

    /// A terminal has no error output.
    fn wanted(&self, suffixes: [&'static str; 2]) -> Vec<(Output, &'static str)> {
        let all = [Output::Stdout, Output::Stderr].into_iter().zip(suffixes);
        all.take(if self.plan.streams.terminal { 1 } else { 2 })
            .collect()
    }

    fn open_input(&mut self, own: &Path) -> anyhow::Result<()> {
        let is_read = matches!(self.plan.program, Program::UntilEof { .. });
        if is_read || self.plan.streams.terminal {
            self.paths.stdin = fifo(own, "stdin")?.display().to_string();
        }
        Ok(())
    }

    fn open_fifos(&mut self, own: &Path) -> anyhow::Result<()> {
        for (output, name) in self.wanted(["stdout", "stderr"]) {
            let path = fifo(own, name)?;
            let text = path.display().to_string();
            match output {
                Output::Stderr => self.paths.stderr = text,
                _ => self.paths.stdout = text,
            }
            let reader = Reader::start(&path, self.plan.streams.is_slow);
            self.outputs.push((output, End::Fifo(reader)));
        }
        Ok(())
    }

    /// Begins to write the input, if that is to be done before the process is started.
    pub(crate) fn write_early(&self) -> anyhow::Result<()> {
        if self.plan.streams.writes_early {
            let writer = Writer::start(Path::new(&self.paths.stdin), self.plan.input())?;
            *self.writer.lock().unwrap_or_else(PoisonError::into_inner) = Some(writer);
        }
        Ok(())
    }

    /// Writes the whole input, in pieces, and closes it.
    pub(crate) fn feed(&self) -> anyhow::Result<()> {
        if self.plan.streams.terminal {
            // Before that it would come back.
            self.wait_for_lines()?;
        }
        let early = self
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        match early {
            Some(writer) => writer.finish(),
            None => Writer::start(Path::new(&self.paths.stdin), self.plan.input())?.finish(),
        }
    }

    /// Waits until all own lines of the process have come, if that is planned.
    pub(crate) fn await_lines(&self) -> anyhow::Result<()> {
        if self.plan.is_awaited {
            self.wait_for_lines()?;
        }
        Ok(())
    }

    fn wait_for_lines(&self) -> anyhow::Result<()> {
        for (output, end) in &self.outputs {
            let due = self.plan.lines_due(*output);
            let mut came = 0;
            let waited = until("its lines come", || {
                came = end.length()?;
                Ok(came >= due)
            });
            waited.with_context(|| format!("{} {output:?}: {came} of {due} bytes", self.name))?;
        }
        Ok(())
    }

    /// The process has ended with this code, and is not deleted: what goes to fifos and loggers
    /// must have ended, with all of it.
    pub(crate) fn check_ended(&self, code: u32) -> anyhow::Result<()> {
        self.check(Some(code), |end| !matches!(end, End::File(_)))
    }

    /// The process is deleted: what it has written to a log file must be there.
    pub(crate) fn check_files(&self, code: u32) -> anyhow::Result<()> {
        self.check(Some(code), |end| matches!(end, End::File(_)))
    }

    /// The process is deleted: all of it must be there.
    pub(crate) fn check_deleted(&self, code: u32) -> anyhow::Result<()> {
        self.check(Some(code), |_| true)
    }

    fn check(&self, code: Option<u32>, is_due: impl Fn(&End) -> bool) -> anyhow::Result<()> {
        for (output, end) in self.outputs.iter().filter(|(_, end)| is_due(end)) {
            let due = self.plan.due(*output, code, self.plan.is_awaited);
            let ended = until("it comes to its end", || end.has_ended());
            let came = end.bytes(self.is_own_word())?;
            let compared = self.compare(*output, end, &due, &came);
            // What came says more than that it did not end.
            match (ended, compared) {
                (Ok(()), compared) => compared?,
                (Err(error), Ok(())) => {
                    return Err(error.context(format!("{} {output:?}", self.name)));
                }
                (Err(error), Err(other)) => bail!("{other}; and {error}"),
            }
        }
        Ok(())
    }

    /// How to tell what is due from the words of a runtime, if one of this process was killed.
    fn is_own_word(&self) -> Option<fn(&[u8]) -> bool> {
        let (id, exec) = self.name.split_once(' ').unwrap_or((&self.name, ""));
        let exec = (!exec.is_empty()).then(|| exec.to_owned());
        let is_killed = self.ground.ledger.runtimes_killed(&(id.to_owned(), exec)) > 0;
        is_killed.then_some(is_own_line)
    }

    fn compare(&self, output: Output, end: &End, due: &Due, came: &[u8]) -> anyhow::Result<()> {
        let found = match end {
            End::File(_) => due.check_with_repeats(came),
            _ => due.check(came).map(|()| 0),
        };
        let name = format!("{} {output:?}", self.name);
        match found {
            Ok(repeated) => {
                self.ground.ledger.stream(&name, came.len(), repeated);
                Ok(())
            }
            Err(why) => {
                self.ground.keep_evidence(&name, came);
                bail!("{name}: {why}")
            }
        }
    }

    /// The same of a process whose runtime was killed. What goes to a logger goes there directly:
    /// what runs for a moment can have written to it.
    pub(crate) fn check_nothing_came_of_refused(&self) -> anyhow::Result<()> {
        match self.plan.streams.sink {
            Sink::Logger => Ok(()),
            Sink::Fifo | Sink::File => self.check_nothing_came(),
        }
    }

    /// The runtime's own code was there and has failed, of which it may have said something, but no
    /// line of the process has come.
    pub(crate) fn check_no_line_came(&self) -> anyhow::Result<()> {
        for (output, end) in &self.outputs {
            if let End::Fifo(reader) = end {
                reader.give_up();
            }
            until("it comes to its end", || end.has_ended())
                .with_context(|| format!("{} {output:?}", self.name))?;
            let came = end.bytes(None)?;
            let mut lines = came.split_inclusive(|&byte| byte == b'\n');
            let is_own = lines.any(|line| !line.trim_ascii().is_empty() && is_own_line(line));
            let shown = String::from_utf8_lossy(&came);
            ensure!(!is_own, "{} {output:?}: {shown:?}", self.name);
            if !came.is_empty() {
                let name = format!("{} {output:?}", self.name);
                self.ground.ledger.note(&format!("{name}: {shown:?}"));
            }
        }
        Ok(())
    }

    /// No process was ever there: nothing may have come, neither of it nor of the runtime, unless
    /// one was killed: then what runs for a moment can have written to its logger.
    pub(crate) fn check_nothing_came(&self) -> anyhow::Result<()> {
        for (output, end) in &self.outputs {
            if let End::Fifo(reader) = end {
                reader.give_up();
                until("it comes to its end", || reader.has_ended())
                    .with_context(|| format!("{} {output:?}", self.name))?;
            }
            let came = end.bytes(self.is_own_word())?;
            self.compare(*output, end, &Due::default(), &came)?;
        }
        Ok(())
    }
}

impl End {
    fn bytes(&self, is_due: Option<fn(&[u8]) -> bool>) -> anyhow::Result<Vec<u8>> {
        match self {
            Self::Fifo(reader) => Ok(reader.bytes()),
            Self::Logged(files, suffix) => Ok(logger::read(files, suffix, is_due)?.0),
            Self::File(path) if path.exists() => fs::read(path).context("a log file"),
            Self::File(_) => Ok(Vec::new()),
        }
    }

    fn length(&self) -> anyhow::Result<usize> {
        match self {
            Self::Fifo(reader) => {
                let length = reader.length();
                ensure!(
                    !reader.has_ended()?,
                    "it has come to its end after {length} bytes"
                );
                Ok(length)
            }
            _ => self.bytes(None).map(|bytes| bytes.len()),
        }
    }

    fn has_ended(&self) -> anyhow::Result<bool> {
        match self {
            Self::Fifo(reader) => reader.has_ended(),
            Self::Logged(files, suffix) => Ok(logger::read(files, suffix, None)?.1),
            Self::File(_) => Ok(true),
        }
    }
}

/// Whether a test process can have written this line, or the runtime.
fn is_own_line(line: &[u8]) -> bool {
    let word = line.trim_ascii();
    word == b"ready" || word.iter().all(u8::is_ascii_digit)
}

fn fifo(own: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let path = own.with_extension(name);
    mkfifo(&path, Mode::S_IRWXU).with_context(|| path.display().to_string())?;
    Ok(path)
}

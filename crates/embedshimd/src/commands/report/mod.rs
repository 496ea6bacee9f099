//! `embedshimd report`: one archive with what a bug report needs. Owns what is in it,
//! and that environments, arguments and mount options of containers are not. Works without a
//! daemon: then it has what is on disk.

mod programs;
mod records;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use tar::{Builder, Header};

use crate::admin::client::fetch;
use crate::backend;
use crate::cli;
use crate::config::{Config, effective};
use crate::outcome::{Code, Failure, print};
use crate::state_dir::lock;

/// Of a longer log the end is taken.
const MAX_LOG: u64 = 4 << 20;
/// More files of a directory are not listed.
const MAX_LISTED: usize = 20_000;

const CONTENTS: &str = "\
What embedshim knows of itself on this machine, for a bug report.

status.json, tasks.json, sandboxes.json, events.json, metrics.txt
                 as the daemon has answered; *.error.txt: why it has not
probe.json       what the kernel offers to exit monitors
config.txt       every setting, and where it is from
versions.txt     kernel, distribution, OCI runtimes, containerd, systemd
log.txt          the end of the daemon's log
state-dir.txt    the names, modes and sizes of the files in the state directory
lives.json       when the last daemons began and ended, and why
records/         of each task what the daemon has recorded
sandboxes/       of each pod without a pause container the same

Left out are environments, arguments, standard streams and mount options of containers, labels of
pods, and what the daemon has inherited. Names of containers, namespaces, images' bundles and sockets are in it: look
through it before you publish it.
";

/// Writes the archive, and says where it is.
pub(crate) fn run(options: &cli::Report) -> Result<Code, Failure> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH);
    let seconds = seconds.unwrap_or_default().as_secs();
    let name = format!("embedshim-report-{seconds}");
    let path = options
        .output
        .clone()
        .unwrap_or_else(|| PathBuf::from(format!("{name}.tar")));
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot create {}", path.display()))?;
    let mut archive = Archive {
        tar: Builder::new(file),
        directory: name,
        seconds,
    };
    collect(&mut archive, &options.locations)
        .and_then(|()| Ok(archive.tar.into_inner()?.flush()?))
        .with_context(|| format!("cannot write {}", path.display()))?;
    print(&format!("{}", path.display()))?;
    Ok(Code::Ok)
}

struct Archive<W: Write> {
    tar: Builder<W>,
    directory: String,
    seconds: u64,
}

impl<W: Write> Archive<W> {
    fn add(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_size(u64::try_from(content.len()).unwrap_or(0));
        header.set_mode(0o600);
        header.set_mtime(self.seconds);
        let path = format!("{}/{name}", self.directory);
        self.tar.append_data(&mut header, path, content)
    }

    /// What a daemon has answered, or why it has not.
    fn add_answer(&mut self, state_dir: &Path, name: &str, path: &str) -> io::Result<()> {
        match fetch(state_dir, path) {
            Ok(body) => self.add(name, &body),
            Err(error) => {
                let text = format!("{}\n", embedshim_core::chain(&error));
                self.add(&format!("{name}.error.txt"), text.as_bytes())
            }
        }
    }
}

fn collect<W: Write>(archive: &mut Archive<W>, locations: &cli::Locations) -> anyhow::Result<()> {
    let state_dir = &locations.state_dir;
    archive.add("README.txt", CONTENTS.as_bytes())?;
    for (name, path) in [
        ("status.json", "/v1/status"),
        ("tasks.json", "/v1/tasks"),
        ("sandboxes.json", "/v1/sandboxes"),
        ("events.json", "/v1/events"),
        ("metrics.txt", "/metrics"),
    ] {
        archive.add_answer(state_dir, name, path)?;
    }
    add_configuration(archive, locations)?;
    archive.add("versions.txt", programs::versions(lock::VERSION).as_bytes())?;
    archive.add("log.txt", &log(state_dir))?;
    archive.add("state-dir.txt", listing(state_dir).as_bytes())?;
    let lives = tail(&state_dir.join("lives.json"), MAX_LOG);
    archive.add("lives.json", &lives.unwrap_or_default())?;
    for (name, record) in records::of_tasks(state_dir) {
        archive.add(&format!("records/{name}"), &record)?;
    }
    for (name, record) in records::of_sandboxes(state_dir) {
        archive.add(&format!("sandboxes/{name}"), &record)?;
    }
    Ok(())
}

/// The settings, and what the exit monitors would be with them. A file that is not valid is told
/// of.
fn add_configuration<W: Write>(
    archive: &mut Archive<W>,
    locations: &cli::Locations,
) -> anyhow::Result<()> {
    let file = locations.config.as_deref();
    let shown = match effective(file) {
        Ok(settings) => super::config::render(&settings),
        Err(failure) => format!("{:#}", failure.error),
    };
    archive.add("config.txt", format!("{shown}\n").as_bytes())?;
    let config = Config::load(file).unwrap_or_default();
    let report = backend::probe(&locations.state_dir, &config);
    Ok(archive.add("probe.json", &serde_json::to_vec_pretty(&report)?)?)
}

/// The log of a daemon that the launcher has started, and systemd's of one that it has.
fn log(state_dir: &Path) -> Vec<u8> {
    let mut log = Vec::new();
    for name in ["embedshimd.log.1", "embedshimd.log"] {
        log.extend(tail(&state_dir.join(name), MAX_LOG).unwrap_or_default());
    }
    if log.is_empty() {
        return programs::journal();
    }
    log
}

/// The last bytes of a file.
fn tail(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(limit)))?;
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Modes, owners, sizes and names of what is in the state directory.
fn listing(state_dir: &Path) -> String {
    let mut lines = Vec::new();
    let mut directories = vec![state_dir.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let (path, Ok(metadata)) = (entry.path(), entry.metadata()) else {
                continue;
            };
            if lines.len() >= MAX_LISTED {
                break;
            }
            lines.push(format!(
                "{:6o} {}:{} {:9} {}",
                metadata.mode(),
                metadata.uid(),
                metadata.gid(),
                metadata.len(),
                path.display()
            ));
            if metadata.is_dir() {
                directories.push(path);
            }
        }
    }
    lines.join("\n") + "\n"
}

//! Metrics in a file, for the textfile collector of `node_exporter`. Only if the configuration
//! names one. Owns that the collector reads a whole file or none, and that nothing is written
//! through what others have put into the directory.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tracing::{info, warn};

use super::view::View;
use super::workers::STACK;
use crate::metrics::textfile;

/// How soon it is looked again whether the daemon serves.
const STARTING: Duration = Duration::from_millis(100);
/// The collector reads as another user.
const MODE: u32 = 0o644;

/// Writes the file from now on, each time after `period`, in a thread of its own.
pub(crate) fn start(view: Arc<View>, path: PathBuf, period: Duration) -> io::Result<()> {
    info!(path = %path.display(), ?period, "metrics are written");
    let work = move || {
        let mut last_failure = None;
        loop {
            let Some(text) = text(&view) else {
                thread::sleep(STARTING);
                continue;
            };
            let failure = replace(&path, &text).err().map(|error| error.to_string());
            if let Some(error) = failure.as_ref().filter(|_| failure != last_failure) {
                warn!(path = %path.display(), error, "cannot write the metrics: trying again");
            }
            last_failure = failure;
            thread::sleep(period);
        }
    };
    let thread = thread::Builder::new()
        .name("metrics-file".into())
        .stack_size(STACK);
    thread.spawn(work).map(drop)
}

/// `None` while the daemon starts.
fn text(view: &View) -> Option<String> {
    let text = view.metrics()?.text(&view.status()).ok()?;
    Some(textfile(&text))
}

/// Replaces the file: a reader sees the old one or the new one.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // The collector reads what ends with `.prom`.
    let draft = path.with_file_name(format!(".{name}.draft"));
    match fs::remove_file(&draft) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(MODE)
            .open(&draft)?;
        file.write_all(text.as_bytes())?;
        fs::rename(&draft, path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&draft);
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_reader_sees_a_whole_file_and_nothing_is_written_through_a_link() {
        let directory = tempfile::tempdir().unwrap();
        let (path, other) = (
            directory.path().join("embedshim.prom"),
            directory.path().join("other"),
        );
        fs::write(&other, "other").unwrap();
        symlink(&other, directory.path().join(".embedshim.prom.draft")).unwrap();
        symlink(&other, &path).unwrap();
        for text in ["first\n", "second\n"] {
            replace(&path, text).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(fs::read_to_string(&other).unwrap(), "other");
        let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o022, 0, "{mode:o}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
        let gone = directory.path().join("gone/embedshim.prom");
        assert_eq!(
            replace(&gone, "x").unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}

//! [`ExecFiles`]: the files of one `exec` call of the runtime, in the bundle. Owns what they say of
//! an exec whose daemon died within the call; never starts one.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::blocking::blocking;
use crate::clock::BootTime;
use crate::error::Error;
use crate::id::ExecId;
use crate::runtime::last_error;

/// The files of one `exec` call. Exec ids cannot hold a slash, nor begin with a dot.
pub(in crate::task) struct ExecFiles {
    /// The OCI `Process`.
    pub(in crate::task) process: PathBuf,
    /// Where the runtime writes the pid.
    pub(in crate::task) pid: PathBuf,
    /// Where runc begins to write it. It does not overwrite what one has left that was killed.
    draft: PathBuf,
    /// Made when the runtime is called.
    pub(in crate::task) mark: PathBuf,
    pub(in crate::task) log: PathBuf,
}

impl ExecFiles {
    pub(in crate::task) fn new(bundle: &Path, exec: &ExecId) -> Self {
        let file = |suffix| bundle.join(format!(".exec-{exec}.{suffix}"));
        Self {
            process: file("process.json"),
            pid: file("pid"),
            draft: bundle.join(format!("..exec-{exec}.pid")),
            mark: file("called"),
            log: file("log.json"),
        }
    }

    /// Writes the process's document, and removes what an earlier attempt has left: its pid file
    /// would be taken for this one's.
    pub(in crate::task) async fn prepare(&self, spec: String) -> Result<(), Error> {
        let (path, left) = (self.process.clone(), self.all());
        let write = move || {
            remove(&left);
            std::fs::write(&path, spec).map_err(|source| Error::Path {
                doing: "cannot write the exec's process document",
                path,
                source,
            })
        };
        blocking(write).await?
    }

    /// Whether the process may have been started though no pid was written: not if the runtime was
    /// never called, nor if it has said why it failed.
    pub(in crate::task) async fn may_have_begun(&self) -> bool {
        // What cannot be looked at may be there.
        let was_called = tokio::fs::try_exists(&self.mark).await.unwrap_or(true);
        was_called && last_error(&self.log).await.is_none()
    }

    /// When the exec has begun, in ticks since boot: after its document was written and before its
    /// pid was. The wall clock of the files is not exact.
    pub(in crate::task) async fn beginning(&self) -> Option<RangeInclusive<u64>> {
        const TOLERANCE: Duration = Duration::from_secs(1);
        let files = [self.process.clone(), self.pid.clone()];
        let times = blocking(move || files.map(|file| file.metadata()?.modified())).await;
        let [Ok(first), Ok(last)] = times.ok()? else {
            return None;
        };
        let first = BootTime::of_wall(first.checked_sub(TOLERANCE)?);
        let last = BootTime::of_wall(last.checked_add(TOLERANCE)?);
        Some(first.ticks()..=last.ticks())
    }

    pub(in crate::task) async fn remove(&self) {
        let files = self.all();
        let _ = blocking(move || remove(&files)).await;
    }

    /// In the order in which they are removed: a mark whose log is gone would say that the runtime
    /// was killed without a word.
    fn all(&self) -> [PathBuf; 5] {
        [&self.process, &self.pid, &self.draft, &self.mark, &self.log].map(PathBuf::clone)
    }
}

fn remove(files: &[PathBuf]) {
    for file in files {
        // Left-overs would go with the bundle.
        let _ = std::fs::remove_file(file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ERROR: &str = r#"{"level":"error","msg":"executable file not found in $PATH"}"#;

    #[tokio::test]
    async fn a_removal_that_is_cut_short_does_not_say_that_a_refused_exec_may_have_run() {
        let bundle = tempfile::tempdir().unwrap();
        let files = ExecFiles::new(bundle.path(), &"e".parse().unwrap());
        for removed in 0..=files.all().len() {
            for file in [&files.process, &files.mark] {
                std::fs::write(file, "{}").unwrap();
            }
            std::fs::write(&files.log, ERROR).unwrap();
            remove(files.all().get(..removed).unwrap());
            assert!(!files.may_have_begun().await, "{removed} files removed");
        }
    }
}

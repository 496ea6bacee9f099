//! [`Lives`]: the daemons that have worked on the state directory since it was made, in
//! `lives.json`. Owns how often the daemon was started again and why the last one ended. Written
//! at a daemon's start and end alone; a failure to do so is logged and changes nothing else.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::lock::VERSION;
use crate::admin::documents::{Restart, Restarts, seconds};

/// So many lives are remembered.
const MAX_LIVES: usize = 16;
/// The longest file that is read.
const MAX_FILE: u64 = 64 * 1024;
/// The longest reason that is remembered, in characters.
const MAX_REASON: usize = 300;
/// Failures that are older are no news.
const RECENT: Duration = Duration::from_mins(10);
/// What is said of a daemon that has written nothing at its end, unless the keeper knows better.
const WORDLESS: &str = "it was killed or crashed: it has not said why it ends";

/// The daemons of a state directory.
#[derive(Debug)]
pub(crate) struct Lives {
    path: PathBuf,
    history: Mutex<History>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct History {
    /// How many daemons have begun, this one included.
    begun: u64,
    /// The last of them, this one included.
    lives: VecDeque<Life>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Life {
    pid: u32,
    version: String,
    /// In milliseconds since the epoch.
    began: u64,
    end: Option<End>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct End {
    /// In milliseconds since the epoch.
    at: u64,
    reason: String,
    was_asked: bool,
}

impl Lives {
    /// Notes that this process begins. `told` is what the keeper has seen of its predecessor's end.
    /// The caller has the directory's lock.
    pub(crate) fn begin(state_dir: &Path, told: Option<&str>) -> Self {
        let path = state_dir.join("lives.json");
        let mut history = read(&path).unwrap_or_default();
        let now = milliseconds(SystemTime::now());
        if let Some(last) = history.lives.back_mut()
            && last.end.is_none()
        {
            last.end = Some(End::new(now, told.unwrap_or(WORDLESS), false));
        }
        history.begun = history.begun.saturating_add(1);
        history.lives.push_back(Life {
            pid: std::process::id(),
            version: VERSION.to_owned(),
            began: now,
            end: None,
        });
        while history.lives.len() > MAX_LIVES {
            history.lives.pop_front();
        }
        let lives = Self {
            path,
            history: Mutex::new(history),
        };
        lives.write_or_warn();
        lives
    }

    /// Notes that this process ends.
    pub(crate) fn end(&self, reason: &str, was_asked: bool) {
        if let Some(own) = self.history().lives.back_mut() {
            let now = milliseconds(SystemTime::now());
            own.end = Some(End::new(now, reason, was_asked));
        }
        self.write_or_warn();
    }

    /// Writes the file again, after it was removed.
    pub(crate) fn recreate(&self) -> io::Result<()> {
        let history = self.history().clone();
        write(&self.path, &history)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The daemons before this one.
    pub(crate) fn restarts(&self) -> Restarts {
        let history = self.history();
        let now = milliseconds(SystemTime::now());
        let ago = |end: &End| Duration::from_millis(now.saturating_sub(end.at));
        let ends = || history.lives.iter().filter_map(|life| life.end.as_ref());
        Restarts {
            count: history.begun.saturating_sub(1),
            recent_failures: ends()
                .filter(|end| !end.was_asked && ago(end) < RECENT)
                .count(),
            last: ends().next_back().map(|end| Restart {
                seconds_ago: seconds(ago(end)),
                reason: end.reason.clone(),
                was_asked: end.was_asked,
            }),
        }
    }

    fn write_or_warn(&self) {
        if let Err(error) = self.recreate() {
            let file = self.path.display();
            warn!(%file, %error, "cannot note the start or the end of this daemon");
        }
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl End {
    fn new(at: u64, reason: &str, was_asked: bool) -> Self {
        Self {
            at,
            reason: reason.chars().take(MAX_REASON).collect(),
            was_asked,
        }
    }
}

/// The history that predecessors have written; `None` if there is none, or if it cannot be read.
fn read(path: &Path) -> Option<History> {
    let file = fs::File::open(path).ok()?;
    let mut text = String::new();
    file.take(MAX_FILE).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

/// Replaces the file: a killed daemon leaves the old one or the new one.
fn write(path: &Path, history: &History) -> io::Result<()> {
    let draft = path.with_extension("draft");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&draft)?;
    file.write_all(&serde_json::to_vec(history)?)?;
    fs::rename(&draft, path)
}

fn milliseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(lives: &Lives) -> (u64, usize, Option<String>) {
        let restarts = lives.restarts();
        let last = restarts.last.map(|last| last.reason);
        (restarts.count, restarts.recent_failures, last)
    }

    #[test]
    fn a_daemon_knows_how_often_and_why_it_was_started_again() {
        let directory = tempfile::tempdir().unwrap();
        let first = Lives::begin(directory.path(), None);
        assert_eq!(told(&first), (0, 0, None));
        first.end("asked to leave", true);
        let second = Lives::begin(directory.path(), Some("what the keeper saw"));
        assert_eq!(told(&second), (1, 0, Some("asked to leave".into())));
        let third = Lives::begin(directory.path(), None);
        assert_eq!(told(&third), (2, 1, Some(WORDLESS.into())));
        let fourth = Lives::begin(directory.path(), Some("killed by signal 9"));
        assert_eq!(told(&fourth), (3, 2, Some("killed by signal 9".into())));
    }

    #[test]
    fn the_history_is_bounded_and_a_damaged_one_is_none() {
        let directory = tempfile::tempdir().unwrap();
        for _ in 0..40 {
            Lives::begin(directory.path(), Some(&"x".repeat(10_000)));
        }
        let lives = Lives::begin(directory.path(), None);
        assert_eq!(lives.restarts().count, 40);
        assert!(fs::metadata(lives.path()).unwrap().len() < 16 * 1024);
        fs::write(lives.path(), "{").unwrap();
        let next = Lives::begin(directory.path(), None);
        assert_eq!(told(&next), (0, 0, None));
        fs::remove_file(next.path()).unwrap();
        next.recreate().unwrap();
        assert!(next.path().exists());
    }
}

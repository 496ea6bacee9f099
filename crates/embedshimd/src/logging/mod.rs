//! Where log lines go: stderr, as text or JSON. journald or the launcher's log file reads it from
//! there.

mod file;

use std::io::{IsTerminal, stderr};
use std::path::Path;

use anyhow::{Context, ensure};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::config::{Log, LogFormat};
use crate::outcome::{Code, Failure};
use file::LogFile;

/// Starts logging of `info` and above, as text, unless logging has started: for the keeper, which
/// reads no configuration file, and for a daemon that could not.
pub(crate) fn start_plain(state_dir: &Path) {
    // Fails if it has started.
    let _ = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::INFO)
        .with_target(false)
        .with_ansi(stderr().is_terminal())
        .with_writer(LogFile::new(state_dir))
        .try_init();
}

/// Starts logging as configured; `level` overrides the configured level.
pub(crate) fn start(config: &Log, level: Option<&str>, state_dir: &Path) -> Result<(), Failure> {
    let level = level.unwrap_or(&config.level);
    let filter = filter(level)
        .with_context(|| {
            format!("log level {level:?} is not valid; say error, warn, info, debug or trace")
        })
        .map_err(|error| Failure::new(Code::Config, error))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(stderr().is_terminal())
        .with_writer(LogFile::new(state_dir));
    match config.format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}

/// Each frame from containerd to the sandbox controller would be a line. An operator asks for them
/// by name (`debug,h2=debug`).
const HTTP2: &str = "h2=info";

/// The filter that a level stands for. A word that is no level is refused: `tracing` takes it for
/// the name of a module and would log only that one's lines.
fn filter(level: &str) -> anyhow::Result<EnvFilter> {
    let mut directives = level.to_owned();
    for part in level.split(',').filter(|part| !part.contains('=')) {
        ensure!(!part.trim().is_empty(), "it is empty");
        if part.trim().parse::<LevelFilter>()? > LevelFilter::INFO {
            directives = format!("{HTTP2},{level}");
        }
    }
    Ok(EnvFilter::try_new(directives)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_http_are_not_among_our_debug_lines() {
        for (level, is_shown) in [("debug", false), ("debug,h2=debug", true)] {
            let filter = filter(level).unwrap().to_string();
            assert_eq!(filter.contains("h2=debug"), is_shown, "{filter}");
            assert_eq!(filter.contains("h2=info"), !is_shown, "{filter}");
        }
    }

    #[test]
    fn a_word_that_is_no_level_is_refused() {
        for level in ["info", "warn,shim_api=debug", "off"] {
            assert!(filter(level).is_ok(), "{level}");
        }
        for level in ["inof", "info,debgu", "shim_api=loud", ""] {
            assert!(filter(level).is_err(), "{level}");
        }
    }
}

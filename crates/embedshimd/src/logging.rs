//! Where log lines go: stderr, as text or JSON. journald or the launcher's log file reads it from there.

use std::io::{IsTerminal, stderr};

use anyhow::Context;
use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};
use crate::outcome::{Code, Failure};

/// Starts logging as text, what is `info` and above: for the keeper, which reads no configuration.
pub(crate) fn start_plain() {
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::INFO)
        .with_target(false)
        .with_ansi(stderr().is_terminal())
        .with_writer(stderr)
        .init();
}

/// Starts logging; `level` overrides the configuration.
pub(crate) fn start(config: &Log, level: Option<&str>) -> Result<(), Failure> {
    let level = level.unwrap_or(&config.level);
    let filter = EnvFilter::try_new(level)
        .with_context(|| {
            format!("log level {level:?} is not valid; say error, warn, info, debug or trace")
        })
        .map_err(|error| Failure::new(Code::Config, error))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(stderr().is_terminal())
        .with_writer(stderr);
    match config.format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}

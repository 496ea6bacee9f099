//! `embedshimd metrics`: what is counted, as a scraper reads it.

use super::text;
use crate::cli;
use crate::outcome::{Code, Failure, print};

/// Asks and prints.
pub(crate) fn run(options: &cli::Metrics) -> Result<Code, Failure> {
    let text = text(&options.state_dir, "/metrics")?;
    print(text.trim_end())?;
    Ok(Code::Ok)
}

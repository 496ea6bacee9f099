//! `embedshimd probe`: what works on this kernel and what would make it better, as the core's table
//! or as JSON. Changes nothing.

use embedshim_core::exit::Durability;

use crate::backend;
use crate::cli::Probe;
use crate::config::Config;
use crate::outcome::{Code, Failure, print};

/// Probes, prints the report, and returns it as an exit code.
pub(crate) fn run(options: &Probe) -> Result<Code, Failure> {
    let config = Config::load(options.locations.config.as_deref())?;
    let report = backend::probe(&options.locations.state_dir, &config);
    let text = if options.json {
        serde_json::to_string_pretty(&report).map_err(anyhow::Error::from)?
    } else {
        report.to_string()
    };
    print(text.trim_end())?;
    Ok(match report.durability {
        Durability::Always => Code::Ok,
        Durability::WhileDaemonRuns => Code::Partly,
        Durability::Unsupported => Code::Unsupported,
    })
}

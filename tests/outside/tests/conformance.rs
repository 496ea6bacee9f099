//! The conformance suite, run with the monitor of this crate.

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use exit_conformance::Subject;
use exit_monitor::ExitMonitor;
use outside_monitor::LookingMonitor;

struct Looking;

impl Subject for Looking {
    fn name(&self) -> &str {
        "looking"
    }

    fn open(
        &self,
        _state: &Path,
        _capacity: u32,
    ) -> Result<Arc<dyn ExitMonitor>, Box<dyn Error + Send + Sync>> {
        Ok(Arc::new(LookingMonitor::new()?))
    }
}

fn main() -> ExitCode {
    exit_conformance::run(&[Arc::new(Looking)])
}

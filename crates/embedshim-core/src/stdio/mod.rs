//! Standard streams of container processes: handed over whole where possible, copied only for terminals.

use serde::{Deserialize, Serialize};

/// The standard streams as a request names them: paths or URIs, empty for none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StdioPaths {
    /// A fifo, or empty.
    pub stdin: String,
    /// A fifo, `file://`, or empty.
    pub stdout: String,
    /// Likewise; unused with a terminal.
    pub stderr: String,
    /// The process gets a terminal.
    pub terminal: bool,
}

/// Why standard streams could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StdioError {}

impl StdioError {
    /// The request itself is wrong, whatever the state of the system.
    pub fn is_request_fault(&self) -> bool {
        match *self {}
    }
}

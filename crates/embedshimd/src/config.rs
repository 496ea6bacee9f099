//! The configuration file: every key is optional, all defaults are in one place, unknown keys are
//! refused. The state directory is not in it: the launcher has to find the socket without a file.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use embedshim_core::exit::{Backend, Policy};
use monitor_bpf::Loader;
use serde::Deserialize;

use crate::outcome::{Code, Failure};

const DEFAULT_FILE: &str = "/etc/embedshim/config.toml";

/// Everything that an operator can set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    pub(crate) monitor: Monitor,
    pub(crate) runtime: Runtime,
    pub(crate) log: Log,
}

/// `[monitor]`: how exits of processes are observed.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Monitor {
    /// `auto`, or the one backend that has to be used.
    pub(crate) backend: BackendChoice,
    /// How many processes can be watched at once.
    pub(crate) capacity: u32,
    /// A file with the kernel's types (BTF), for a kernel that does not bring them.
    pub(crate) btf: Option<PathBuf>,
    /// What loads the BPF program.
    pub(crate) loader: LoaderChoice,
}

/// `[runtime]`: how the OCI runtime is called.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Runtime {
    /// The longest that one call, with its hooks, may take.
    pub(crate) deadline_seconds: u64,
}

/// `[log]`: what is logged, and how.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Log {
    pub(crate) level: String,
    pub(crate) format: LogFormat,
}

/// Which exit monitor the daemon is to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum BackendChoice {
    #[default]
    Auto,
    Bpf,
    Pidfd,
    Ptrace,
}

/// What loads the BPF program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LoaderChoice {
    #[default]
    Aya,
    /// In builds with the feature `libbpf`.
    #[cfg(feature = "libbpf")]
    Libbpf,
}

impl LoaderChoice {
    /// The loader as the backend names it.
    pub(crate) fn loader(self) -> Loader {
        match self {
            Self::Aya => Loader::Aya,
            #[cfg(feature = "libbpf")]
            Self::Libbpf => Loader::Libbpf,
        }
    }
}

/// The form of a log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LogFormat {
    #[default]
    Text,
    Json,
}

impl Default for Monitor {
    fn default() -> Self {
        // Ten times 110 pods of a dozen processes each; 16,384 entries cost 2.5 MB of kernel
        // memory.
        Self {
            backend: BackendChoice::Auto,
            capacity: 16_384,
            btf: None,
            loader: LoaderChoice::Aya,
        }
    }
}

impl Default for Runtime {
    fn default() -> Self {
        // Longer than kubelet waits (2 minutes): the daemon never gives up a slow hook first.
        Self {
            deadline_seconds: 300,
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".into(),
            format: LogFormat::Text,
        }
    }
}

impl BackendChoice {
    /// The choice as a policy for the core, which selects the backend.
    pub(crate) fn policy(self) -> Policy {
        match self {
            Self::Auto => Policy::Auto,
            Self::Bpf => Policy::Only(Backend::Bpf),
            Self::Pidfd => Policy::Only(Backend::Pidfd),
            Self::Ptrace => Policy::Only(Backend::Ptrace),
        }
    }
}

impl Config {
    /// Reads the requested file, or the default file if that exists.
    pub(crate) fn load(requested: Option<&Path>) -> Result<Self, Failure> {
        let path = requested.map_or_else(|| PathBuf::from(DEFAULT_FILE), Path::to_owned);
        let invalid = |error: anyhow::Error| Failure::new(Code::Config, error);
        match std::fs::read_to_string(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && requested.is_none() => {
                Ok(Self::default())
            }
            text => text
                .map_err(anyhow::Error::from)
                .and_then(|text| Self::parse(&text))
                .with_context(|| format!("configuration file {}", path.display()))
                .map_err(invalid),
        }
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let config: Self = toml::from_str(text)?;
        anyhow::ensure!(
            config.monitor.capacity > 0,
            "monitor.capacity must be at least 1"
        );
        anyhow::ensure!(
            config.runtime.deadline_seconds > 0,
            "runtime.deadline_seconds must be at least 1"
        );
        Ok(config)
    }

    /// The longest that one call of the OCI runtime may take.
    pub(crate) fn runtime_deadline(&self) -> Duration {
        Duration::from_secs(self.runtime.deadline_seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_the_defaults() {
        assert_eq!(Config::parse("").unwrap(), Config::default());
    }

    #[test]
    fn the_packaged_file_says_what_the_defaults_are() {
        let file = include_str!("../../../packaging/config.toml");
        assert_eq!(Config::parse(file).unwrap(), Config::default());
        let is_setting = |line: &str| line.starts_with('#') && !line.starts_with("# ");
        let uncommented: String = file
            .lines()
            .map(|line| {
                line.strip_prefix('#')
                    .filter(|_| is_setting(line))
                    .unwrap_or(line)
            })
            .flat_map(|line| [line, "\n"])
            .collect();
        assert_eq!(uncommented.matches(" = ").count(), 7, "{uncommented}");
        assert_eq!(Config::parse(&uncommented).unwrap(), Config::default());
    }

    #[test]
    fn a_mistake_is_named_with_its_line() {
        let error = Config::parse("[monitor]\ncapacity = 1\nbakend = \"bpf\"\n").unwrap_err();
        insta::assert_snapshot!(error);
        let error = Config::parse("[monitor]\ncapacity = 0\n").unwrap_err();
        insta::assert_snapshot!(error);
    }
}

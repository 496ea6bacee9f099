//! The configuration file: every key is optional, all defaults are in one place, unknown keys are
//! refused. The state directory is not in it: the launcher has to find the socket without a file.

pub(crate) mod origins;
#[cfg(feature = "otel")]
mod telemetry;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use embedshim_core::exit::{Backend, Policy};
use monitor_bpf::Loader;
use serde::{Deserialize, Serialize};

use crate::cli::LOG_VARIABLE;
use crate::outcome::{Code, Failure};
use origins::{Origin, Setting};
#[cfg(feature = "otel")]
pub(crate) use telemetry::Telemetry;

const DEFAULT_FILE: &str = "/etc/embedshim/config.toml";

/// Everything that an operator can set.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    pub(crate) monitor: Monitor,
    pub(crate) runtime: Runtime,
    pub(crate) log: Log,
    pub(crate) metrics: Metrics,
    pub(crate) sandbox: Sandbox,
    #[cfg(feature = "otel")]
    pub(crate) telemetry: Telemetry,
}

/// `[monitor]`: how exits of processes are observed.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
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
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Runtime {
    /// The longest that one call, with its hooks, may take.
    pub(crate) deadline_seconds: u64,
}

/// `[log]`: what is logged, and how.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Log {
    pub(crate) level: String,
    pub(crate) format: LogFormat,
}

/// `[metrics]`: where they are beside the admin socket.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Metrics {
    /// An address and a port, for plain HTTP; nowhere if there is none.
    pub(crate) listen: Option<SocketAddr>,
    /// A file that is written for the textfile collector of `node_exporter`; none by default.
    pub(crate) textfile: Option<PathBuf>,
    /// How often.
    pub(crate) textfile_seconds: u64,
}

/// `[sandbox]`: pods without a pause container, of which this daemon is the sandbox controller.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Sandbox {
    /// Whether it is one.
    pub(crate) enabled: bool,
    /// The root directory of containerd's CRI.
    pub(crate) cri_root: PathBuf,
    /// Its state directory.
    pub(crate) cri_state: PathBuf,
    /// containerd's socket, which is asked for the pods that it knows.
    pub(crate) containerd: PathBuf,
    /// containerd's ttrpc socket, to which the events of these pods' containers are forwarded.
    pub(crate) events: PathBuf,
    /// As `enable_unprivileged_ports` of the CRI, which does not tell it.
    pub(crate) unprivileged_ports: bool,
    /// As `enable_unprivileged_icmp`.
    pub(crate) unprivileged_ping: bool,
}

/// Which exit monitor the daemon is to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum BackendChoice {
    #[default]
    Auto,
    Bpf,
    Pidfd,
    Ptrace,
}

/// What loads the BPF program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
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

impl Default for Metrics {
    fn default() -> Self {
        // As often as Prometheus scrapes, mostly.
        Self {
            listen: None,
            textfile: None,
            textfile_seconds: 15,
        }
    }
}

impl Metrics {
    /// Refuses a file that could never be written or would never be read.
    fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.textfile_seconds > 0,
            "metrics.textfile_seconds must be at least 1"
        );
        let Some(path) = &self.textfile else {
            return Ok(());
        };
        let is_read = path
            .extension()
            .is_some_and(|extension| extension == "prom");
        anyhow::ensure!(
            path.is_absolute() && is_read,
            "metrics.textfile must be an absolute path that ends with .prom: other files are not read"
        );
        let directory = path.parent().unwrap_or(path);
        anyhow::ensure!(
            directory.is_dir(),
            "metrics.textfile: there is no directory {}",
            directory.display()
        );
        Ok(())
    }
}

impl Default for Sandbox {
    fn default() -> Self {
        Self {
            enabled: false,
            cri_root: "/var/lib/containerd/io.containerd.grpc.v1.cri".into(),
            cri_state: "/run/containerd/io.containerd.grpc.v1.cri".into(),
            containerd: "/run/containerd/containerd.sock".into(),
            events: "/run/containerd/containerd.sock.ttrpc".into(),
            unprivileged_ports: true,
            unprivileged_ping: true,
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
        read(requested).map(|(config, _)| config)
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let config: Self = toml::from_str(text).map_err(|error| {
            let foreign = || (!cfg!(feature = "otel")).then(|| origins::needs_otel(text))?;
            let hint = foreign().or_else(|| {
                let meant = origins::suggestion(error.message())?;
                Some(format!("did you mean `{meant}`?"))
            });
            match hint {
                Some(hint) => anyhow::anyhow!("{}\n{hint}", error.to_string().trim_end()),
                None => error.into(),
            }
        })?;
        anyhow::ensure!(
            config.monitor.capacity > 0,
            "monitor.capacity must be at least 1"
        );
        anyhow::ensure!(
            config.runtime.deadline_seconds > 0,
            "runtime.deadline_seconds must be at least 1"
        );
        config.metrics.check()?;
        #[cfg(feature = "otel")]
        config.telemetry.check()?;
        let Sandbox {
            cri_root,
            cri_state,
            containerd,
            events,
            ..
        } = &config.sandbox;
        let paths = [
            ("cri_root", cri_root),
            ("cri_state", cri_state),
            ("containerd", containerd),
            ("events", events),
        ];
        for (name, path) in paths {
            let is_plain = path.is_absolute() && path.to_str().is_some();
            anyhow::ensure!(is_plain, "sandbox.{name} must be an absolute path in UTF-8");
        }
        Ok(config)
    }

    /// The longest that one call of the OCI runtime may take.
    pub(crate) fn runtime_deadline(&self) -> Duration {
        Duration::from_secs(self.runtime.deadline_seconds)
    }
}

/// The configuration, and the file that it is from.
fn read(requested: Option<&Path>) -> Result<(Config, Option<(PathBuf, String)>), Failure> {
    let path = requested.map_or_else(|| PathBuf::from(DEFAULT_FILE), Path::to_owned);
    let text = match std::fs::read_to_string(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound && requested.is_none() => {
            return Ok((Config::default(), None));
        }
        text => text.map_err(anyhow::Error::from),
    };
    let read = text.and_then(|text| Ok((Config::parse(&text)?, text)));
    match read.with_context(|| format!("configuration file {}", path.display())) {
        Ok((config, text)) => Ok((config, Some((path, text)))),
        Err(error) => Err(Failure::new(Code::Config, error)),
    }
}

/// Every setting that a daemon would have with this file, and where it is from: a variable of the
/// environment goes before the file.
pub(crate) fn effective(requested: Option<&Path>) -> Result<Vec<Setting>, Failure> {
    let (config, file) = read(requested)?;
    let file = file
        .as_ref()
        .map(|(path, text)| (path.as_path(), text.as_str()));
    let values = toml::Table::try_from(&config).map_err(anyhow::Error::from)?;
    let mut settings = origins::settings(&values, file);
    let mut override_by = |variable, key| {
        if let Some(value) = std::env::var_os(variable)
            && let Some(setting) = settings.iter_mut().find(|setting| setting.key == key)
        {
            setting.value = Some(format!("{:?}", value.to_string_lossy()));
            setting.origin = Origin::Variable(variable);
        }
    };
    override_by(LOG_VARIABLE, "log.level");
    // The one that counts is the last to be looked at.
    #[cfg(feature = "otel")]
    for variable in telemetry::VARIABLES.into_iter().rev() {
        override_by(variable, "telemetry.endpoint");
    }
    Ok(settings)
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
        let file = include_str!("../../../../packaging/config.toml");
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
        assert_eq!(uncommented.matches(" = ").count(), 19, "{uncommented}");
        assert_eq!(Config::parse(&uncommented).unwrap(), Config::default());
    }

    #[test]
    fn every_key_of_the_configuration_is_listed() {
        let mut config = Config::default();
        config.monitor.btf = Some("/btf".into());
        config.metrics.listen = "127.0.0.1:1".parse().ok();
        config.metrics.textfile = Some("/x.prom".into());
        #[cfg(feature = "otel")]
        {
            config.telemetry.endpoint = Some("http://collector".into());
        }
        let table = toml::Table::try_from(&config).unwrap();
        let mut keys: Vec<(&str, &str)> = Vec::new();
        for (section, values) in &table {
            let values = values.as_table().unwrap();
            keys.extend(values.keys().map(|key| (section.as_str(), key.as_str())));
        }
        let mut listed = origins::KEYS.to_vec();
        listed.sort_unstable();
        keys.sort_unstable();
        assert_eq!(listed, keys);
    }

    #[test]
    fn a_mistake_is_named_with_its_line() {
        let error = Config::parse("[monitor]\ncapacity = 1\nbakend = \"bpf\"\n").unwrap_err();
        insta::assert_snapshot!(error);
        let error = Config::parse("[monitor]\ncapacity = 0\n").unwrap_err();
        insta::assert_snapshot!(error);
        for (value, why) in [
            ("/nonexistent/a.prom", "there is no directory /nonexistent"),
            ("a.prom", "an absolute path"),
            ("/tmp/a.txt", "ends with .prom"),
        ] {
            let error = Config::parse(&format!("[metrics]\ntextfile = {value:?}\n"));
            let error = error.unwrap_err().to_string();
            assert!(
                error.contains("metrics.textfile") && error.contains(why),
                "{error}"
            );
        }
        let error = Config::parse("[sandbox]\ncri_root = \"containerd\"\n").unwrap_err();
        insta::assert_snapshot!(error);
    }
}

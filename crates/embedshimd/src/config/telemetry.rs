//! `[telemetry]`: where spans are sent, and of which requests. Owns which endpoints are valid.

use anyhow::{Context, ensure};
use http::Uri;
use serde::{Deserialize, Serialize};

/// Where OTLP receives spans, below an endpoint.
const TRACES: &str = "v1/traces";
/// The variables of OpenTelemetry's specification, the one that names the whole address first.
pub(super) const VARIABLES: [&str; 2] = [
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
];

/// `[telemetry]`, in builds with the feature `otel`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Telemetry {
    /// A collector, such as `http://127.0.0.1:4318`; none by default.
    pub(crate) endpoint: Option<String>,
    /// Of the requests that belong to no trace, how many begin one: from 0 to 1.
    pub(crate) root_ratio: f64,
}

impl Default for Telemetry {
    fn default() -> Self {
        // Each call of the launcher, and all of a containerd without traces, would be a trace.
        Self {
            endpoint: None,
            root_ratio: 0.0,
        }
    }
}

impl Telemetry {
    /// Refuses what could never be sent to.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        ensure!(
            (0.0..=1.0).contains(&self.root_ratio),
            "telemetry.root_ratio must be from 0 to 1"
        );
        match &self.endpoint {
            Some(endpoint) => check(endpoint).context("telemetry.endpoint"),
            None => Ok(()),
        }
    }

    /// The address to send spans to: as the environment has it, or else the file.
    pub(crate) fn effective_endpoint(&self) -> anyhow::Result<Option<String>> {
        self.endpoint_among(|name| std::env::var(name).ok())
    }

    fn endpoint_among(
        &self,
        variable: impl Fn(&str) -> Option<String>,
    ) -> anyhow::Result<Option<String>> {
        let [whole, base] = VARIABLES.map(|name| {
            let value = variable(name).filter(|value| !value.is_empty());
            value.map(|value| (name, value))
        });
        if let Some((name, whole)) = whole {
            check(&whole).context(name)?;
            return Ok(Some(whole));
        }
        let configured = || Some(("telemetry.endpoint", self.endpoint.clone()?));
        let Some((name, base)) = base.or_else(configured) else {
            return Ok(None);
        };
        check(&base).context(name)?;
        Ok(Some(format!("{}/{TRACES}", base.trim_end_matches('/'))))
    }
}

fn check(endpoint: &str) -> anyhow::Result<()> {
    let uri: Uri = endpoint
        .parse()
        .with_context(|| format!("{endpoint:?} is no URL"))?;
    ensure!(
        uri.scheme_str() == Some("http"),
        "{endpoint:?} must begin with http:// (https is not built in: send to a collector on this \
         node, which can)"
    );
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    ensure!(
        !authority.contains('@') && uri.query().is_none(),
        "{endpoint:?} must have no user and no query"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(file: Option<&str>, variables: &[(&str, &str)]) -> Option<String> {
        let telemetry = Telemetry {
            endpoint: file.map(str::to_owned),
            ..Telemetry::default()
        };
        let value = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        telemetry.endpoint_among(value).unwrap()
    }

    #[test]
    fn the_environment_goes_before_the_file() {
        let [whole, base] = VARIABLES;
        let file = Some("http://file:1/");
        assert_eq!(endpoint(None, &[(base, "")]), None);
        let is = |variables: &[(&str, &str)]| endpoint(file, variables).unwrap();
        assert_eq!(is(&[]), "http://file:1/v1/traces");
        assert_eq!(is(&[(base, "http://base:2")]), "http://base:2/v1/traces");
        let both = [(base, "http://base:2"), (whole, "http://whole:3/x")];
        assert_eq!(is(&both), "http://whole:3/x");
    }

    #[test]
    fn the_packaged_section_is_valid_and_says_what_the_defaults_are() {
        let file = include_str!("../../../../packaging/config.toml");
        let (_, section) = file.split_once("# [telemetry]\n").unwrap();
        let (section, _) = section.split_once("\n\n").unwrap();
        let lines = section.lines().filter_map(|line| line.strip_prefix("# "));
        let settings: Vec<&str> = lines.filter(|line| line.contains(" = ")).collect();
        assert_eq!(settings.len(), 2, "{section}");
        let telemetry: Telemetry = toml::from_str(&settings.join("\n")).unwrap();
        telemetry.check().unwrap();
        let default = Telemetry::default();
        assert!(telemetry.endpoint.is_some() && default.endpoint.is_none());
        assert!((telemetry.root_ratio - default.root_ratio).abs() < f64::EPSILON);
    }

    #[test]
    fn an_endpoint_that_cannot_be_sent_to_is_refused() {
        for refused in [
            "",
            "127.0.0.1:4318",
            "https://collector:4318",
            "http://",
            "http://user@collector",
            "http://collector/?a=b",
            "unix:///run/collector.sock",
        ] {
            assert!(check(refused).is_err(), "{refused}");
        }
        for taken in [
            "http://127.0.0.1:4318",
            "http://[::1]:4318/",
            "http://collector/a",
        ] {
            assert!(check(taken).is_ok(), "{taken}");
        }
        for root_ratio in [-0.1, 1.1, f64::NAN] {
            let telemetry = Telemetry {
                root_ratio,
                ..Telemetry::default()
            };
            assert!(telemetry.check().is_err(), "{root_ratio}");
        }
    }
}

//! `embedshimd probe`: what works here and what would make it better, as a table or as JSON.

use std::fmt::Write;

use embedshim_core::exit::{Availability, Choice, FeatureState, Guarantees, NoBackend, Survives};
use serde::Serialize;

use crate::backend;
use crate::cli::Probe;
use crate::config::Config;
use crate::outcome::{Code, Failure};

/// What probing found, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    backends: Vec<Availability>,
    choice: Result<Choice, String>,
    verdict: Verdict,
}

/// How well promise 1, "nothing is lost", is kept here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Kept,
    Partly,
    Unsupported,
}

/// Probes and prints.
pub(crate) fn run(options: &Probe) -> Result<Code, Failure> {
    let config = Config::load(options.locations.config.as_deref())?;
    let backends = backend::candidates(&options.locations.state_dir, &config);
    let choice = backend::select(&backends, &config);
    let report = Report::new(backends, choice);
    let text = if options.json {
        serde_json::to_string_pretty(&report).map_err(anyhow::Error::from)?
    } else {
        report.table()
    };
    println!("{}", text.trim_end());
    Ok(match report.verdict {
        Verdict::Kept => Code::Ok,
        Verdict::Partly => Code::Partly,
        Verdict::Unsupported => Code::Unsupported,
    })
}

impl Report {
    fn new(backends: Vec<Availability>, choice: Result<Choice, NoBackend>) -> Self {
        let verdict = match &choice {
            Err(_) => Verdict::Unsupported,
            Ok(choice) if choice.guarantees.survives == Survives::Everything => Verdict::Kept,
            Ok(_) => Verdict::Partly,
        };
        Self {
            backends,
            choice: choice.map_err(|none| none.to_string()),
            verdict,
        }
    }

    fn table(&self) -> String {
        let mut text = String::new();
        for backend in &self.backends {
            self.backend(&mut text, backend);
        }
        let line = match (&self.choice, self.verdict) {
            (Ok(choice), Verdict::Kept) => {
                format!(
                    "The daemon would use {}: no exit is lost, whoever is killed.",
                    choice.backend
                )
            }
            (Ok(choice), _) => format!(
                "The daemon would use {}: {}.",
                choice.backend,
                match choice.guarantees.survives {
                    Survives::WithDescriptors =>
                        "an exit while the daemon is down is known only if somebody keeps its descriptors",
                    _ => "an exit while the daemon is down is lost",
                }
            ),
            (Err(why), _) => why.clone(),
        };
        text.push_str(&line);
        text.push('\n');
        text
    }

    fn backend(&self, text: &mut String, backend: &Availability) {
        let chosen = self
            .choice
            .as_ref()
            .is_ok_and(|choice| choice.backend == backend.backend);
        let mark = if chosen { "  <- chosen" } else { "" };
        let verdict = match &backend.verdict {
            Ok(guarantees) => describe(*guarantees),
            Err(why) => format!("cannot run: {why}"),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}: {verdict}{mark}", backend.backend);
        let width = backend
            .features
            .iter()
            .map(|feature| feature.name.len())
            .max()
            .unwrap_or(0);
        for feature in &backend.features {
            let (sign, why) = match &feature.state {
                FeatureState::Present => ("yes", String::new()),
                FeatureState::Missing { why, .. } => ("no ", format!("  [{why}]")),
            };
            let _ = writeln!(
                text,
                "  {sign}  {:width$}  since {:5}  {}{why}",
                feature.name, feature.since, feature.used_for
            );
        }
        for remedy in &backend.remedies {
            let _ = writeln!(text, "  To improve: {remedy}");
        }
        text.push('\n');
    }
}

fn describe(guarantees: Guarantees) -> String {
    let survives = match guarantees.survives {
        Survives::Everything => "records exits though nothing of ours is alive",
        Survives::WithDescriptors => "knows exits whose descriptors somebody keeps",
        Survives::Nothing => "knows exits while the daemon lives",
    };
    let exact = if guarantees.exact_for_others {
        "exact status"
    } else {
        "exact status of children only"
    };
    let time = if guarantees.exact_time {
        "exact time"
    } else {
        "time of observation"
    };
    format!("{survives}; {exact}; {time}")
}

#[cfg(test)]
mod tests {
    use embedshim_core::exit::{Backend, Feature, Policy, choose};

    use super::*;

    fn modern(with_bpffs: bool) -> Vec<Availability> {
        let missing = (
            "/sys/fs/bpf is not a bpffs".to_owned(),
            Some("mount -t bpf bpf /sys/fs/bpf".to_owned()),
        );
        let survives = |survives| Guarantees {
            survives,
            exact_for_others: true,
            exact_time: true,
        };
        vec![
            Availability {
                backend: Backend::Pidfd,
                features: vec![Feature::tried("pidfd_open", "5.3", "readiness", Ok(()))],
                verdict: Ok(Guarantees {
                    exact_time: false,
                    ..survives(Survives::WithDescriptors)
                }),
                remedies: Vec::new(),
            },
            Availability {
                backend: Backend::Bpf,
                features: vec![
                    Feature::tried("raw tracepoint", "4.17", "every exit", Ok(())),
                    Feature::tried(
                        "pinning",
                        "5.7",
                        "survival",
                        if with_bpffs { Ok(()) } else { Err(missing) },
                    ),
                ],
                verdict: Ok(survives(if with_bpffs {
                    Survives::Everything
                } else {
                    Survives::Nothing
                })),
                remedies: if with_bpffs {
                    Vec::new()
                } else {
                    vec!["mount -t bpf bpf /sys/fs/bpf".into()]
                },
            },
            Availability {
                backend: Backend::Ptrace,
                features: Vec::new(),
                verdict: Err("not supported yet".into()),
                remedies: Vec::new(),
            },
        ]
    }

    fn report(with_bpffs: bool, policy: Policy) -> Report {
        let found = modern(with_bpffs);
        let choice = choose(&found, policy);
        Report::new(found, choice)
    }

    #[test]
    fn the_table_says_what_is_chosen_and_what_would_help() {
        insta::assert_snapshot!("modern", report(true, Policy::Auto).table());
        insta::assert_snapshot!("without_bpffs", report(false, Policy::Auto).table());
        insta::assert_snapshot!(
            "ptrace_forced",
            report(true, Policy::Only(Backend::Ptrace)).table()
        );
    }

    #[test]
    fn json_is_for_programs() {
        let json = serde_json::to_value(report(true, Policy::Auto)).unwrap();
        assert_eq!(json["verdict"], "kept");
        assert_eq!(json["choice"]["Ok"]["backend"], "bpf");
    }
}

//! [`Report`]: which exit monitor to use, from what probing found and what was asked for, with the
//! reason for each place. A pure function: it never probes and never starts a backend.

use std::cmp::Reverse;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Availability, Backend, Guarantees, Survives};

/// What the operator asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// The best that runs here.
    #[default]
    Auto,
    /// This one, or refuse to start.
    Only(Backend),
}

/// What probing found, and what follows from it. Its `Display` is the table that `embedshimd probe`
/// prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Everything that was tried, backend by backend.
    pub backends: Vec<Availability>,
    /// The backends, best first.
    pub ranking: Vec<Place>,
    /// When an exit stays known on this machine.
    pub durability: Durability,
    /// What an administrator can do for more, each once.
    pub remedies: Vec<String>,
}

/// A backend's place in the ranking.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Which one.
    pub backend: Backend,
    /// Whether it is to be used.
    pub is_chosen: bool,
    /// What it promises here; none if it cannot run.
    pub guarantees: Option<Guarantees>,
    /// Why it has this place.
    pub why: String,
}

/// When an exit stays known on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// Always, whatever is killed.
    Always,
    /// As long as the daemon runs, or a descriptor store has its pidfds.
    WhileDaemonRuns,
    /// No exit monitor runs.
    Unsupported,
}

/// The backend to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Which one.
    pub backend: Backend,
    /// What it promises here.
    pub guarantees: Guarantees,
}

/// No backend that the policy allows can run here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct NoBackend {
    /// Every backend with its reason.
    pub ranking: Vec<Place>,
}

impl fmt::Display for NoBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reasons = self.ranking.iter();
        let reasons = reasons.map(|place| format!("{}: {}", place.backend, place.why));
        let reasons: Vec<_> = reasons.collect();
        write!(f, "no exit monitor can run here: {}", reasons.join("; "))
    }
}

impl Report {
    /// Ranks by guarantees; among equals, the earlier in `backends` is first (list them cheapest
    /// first).
    pub fn new(backends: Vec<Availability>, policy: Policy) -> Self {
        let mut order: Vec<&Availability> = backends.iter().collect();
        order.sort_by_key(|found| {
            (
                !policy.allows(found.backend),
                Reverse(found.verdict.clone().ok()),
            )
        });
        let chosen = order
            .first()
            .filter(|found| policy.allows(found.backend))
            .and_then(|found| found.verdict.clone().ok());
        let places = order.iter().enumerate().map(|(place, found)| Place {
            backend: found.backend,
            is_chosen: place == 0 && chosen.is_some(),
            guarantees: found.verdict.clone().ok(),
            why: why(found, place, chosen, policy),
        });
        let ranking = places.collect();
        let durability = match chosen.map(|chosen| chosen.survives) {
            None => Durability::Unsupported,
            Some(Survives::Everything) => Durability::Always,
            Some(_) => Durability::WhileDaemonRuns,
        };
        let mut remedies: Vec<String> = Vec::new();
        for remedy in backends.iter().flat_map(|found| &found.remedies) {
            if !remedies.contains(remedy) {
                remedies.push(remedy.clone());
            }
        }
        Self {
            backends,
            ranking,
            durability,
            remedies,
        }
    }

    /// The backend to use.
    pub fn choice(&self) -> Result<Choice, NoBackend> {
        let chosen = self.ranking.iter().find(|place| place.is_chosen);
        let choice = chosen.and_then(|place| {
            Some(Choice {
                backend: place.backend,
                guarantees: place.guarantees?,
            })
        });
        choice.ok_or_else(|| NoBackend {
            ranking: self.ranking.clone(),
        })
    }
}

impl Policy {
    fn allows(self, backend: Backend) -> bool {
        match self {
            Self::Auto => true,
            Self::Only(only) => only == backend,
        }
    }
}

fn why(found: &Availability, place: usize, chosen: Option<Guarantees>, policy: Policy) -> String {
    let own = match &found.verdict {
        Err(why) => return format!("cannot run: {why}"),
        Ok(own) => *own,
    };
    match (policy, chosen) {
        (Policy::Only(only), _) if only != found.backend => {
            format!("the configuration asks for {only}")
        }
        (_, Some(chosen)) if place > 0 => worse(own, chosen),
        _ => own.to_string(),
    }
}

/// The first thing in which `own` promises less.
fn worse(own: Guarantees, chosen: Guarantees) -> String {
    if own.survives < chosen.survives {
        own.survives.to_string()
    } else if own.others < chosen.others {
        own.others.to_string()
    } else if chosen.exact_time && !own.exact_time {
        "the time is that of the exit's observation".into()
    } else {
        "promises the same for more".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Exactness;

    fn candidate(backend: Backend, verdict: Result<Survives, &str>) -> Availability {
        Availability {
            backend,
            features: Vec::new(),
            verdict: verdict
                .map(|survives| Guarantees {
                    survives,
                    others: Exactness::Always,
                    exact_time: true,
                })
                .map_err(str::to_owned),
            remedies: vec!["mount it".into()],
        }
    }

    #[test]
    fn the_one_that_survives_more_wins() {
        let found = vec![
            candidate(Backend::Pidfd, Ok(Survives::WithDescriptors)),
            candidate(Backend::Ptrace, Err("not allowed")),
            candidate(Backend::Bpf, Ok(Survives::Everything)),
        ];
        let report = Report::new(found, Policy::Auto);
        assert_eq!(report.choice().unwrap().backend, Backend::Bpf);
        let order: Vec<_> = report.ranking.iter().map(|place| place.backend).collect();
        assert_eq!(order, [Backend::Bpf, Backend::Pidfd, Backend::Ptrace]);
        assert_eq!(report.durability, Durability::Always);
        assert_eq!(report.remedies, ["mount it"]);
    }

    #[test]
    fn a_forced_backend_is_never_replaced() {
        let found = vec![
            candidate(Backend::Pidfd, Ok(Survives::WithDescriptors)),
            candidate(Backend::Bpf, Err("bpffs is not mounted")),
        ];
        let report = Report::new(found, Policy::Only(Backend::Bpf));
        assert_eq!(report.durability, Durability::Unsupported);
        let refused = report.choice().unwrap_err().to_string();
        assert!(refused.contains("bpffs is not mounted"), "{refused}");
        assert!(
            refused.contains("the configuration asks for bpf"),
            "{refused}"
        );
    }
}

//! The choice between exit monitors: a pure function of what probing found and what was asked for.
//! Never probes, never starts a backend.

use serde::{Deserialize, Serialize};

use super::{Availability, Backend, Guarantees};

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

/// The chosen backend, and why not the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// The one to use.
    pub backend: Backend,
    /// What it promises here.
    pub guarantees: Guarantees,
    /// The others, best first, each with the reason for its place.
    pub rejected: Vec<Rejected>,
}

/// A backend that was not chosen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejected {
    /// Which one.
    pub backend: Backend,
    /// Why not.
    pub why: String,
}

/// No backend that the policy allows can run here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no exit monitor can run here: {}", .rejected.iter().map(|r| format!("{}: {}", r.backend, r.why)).collect::<Vec<_>>().join("; "))]
pub struct NoBackend {
    /// Every backend with its reason.
    pub rejected: Vec<Rejected>,
}

/// Chooses by guarantees; among equals, the earlier in `candidates` wins (list them cheapest first).
pub fn choose(candidates: &[Availability], policy: Policy) -> Result<Choice, NoBackend> {
    let allowed = |backend| match policy {
        Policy::Auto => true,
        Policy::Only(only) => only == backend,
    };
    let mut best: Option<(&Availability, Guarantees)> = None;
    for candidate in candidates.iter().filter(|c| allowed(c.backend)) {
        if let Ok(guarantees) = candidate.verdict
            && best.is_none_or(|(_, previous)| guarantees > previous)
        {
            best = Some((candidate, guarantees));
        }
    }
    let rejected = candidates
        .iter()
        .filter(|c| best.is_none_or(|(chosen, _)| chosen.backend != c.backend))
        .map(|c| Rejected {
            backend: c.backend,
            why: match &c.verdict {
                Err(why) => why.clone(),
                Ok(_) if !allowed(c.backend) => "the configuration asks for another one".into(),
                Ok(_) => "promises less than the chosen one".into(),
            },
        })
        .collect();
    match best {
        Some((chosen, guarantees)) => Ok(Choice {
            backend: chosen.backend,
            guarantees,
            rejected,
        }),
        None => Err(NoBackend { rejected }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Survives;

    fn candidate(backend: Backend, verdict: Result<Survives, &str>) -> Availability {
        Availability {
            backend,
            features: Vec::new(),
            verdict: verdict
                .map(|survives| Guarantees {
                    survives,
                    exact_for_others: true,
                    exact_time: true,
                })
                .map_err(str::to_owned),
            remedies: Vec::new(),
        }
    }

    #[test]
    fn the_one_that_survives_more_wins() {
        let found = [
            candidate(Backend::Pidfd, Ok(Survives::WithDescriptors)),
            candidate(Backend::Bpf, Ok(Survives::Everything)),
            candidate(Backend::Ptrace, Err("not built yet")),
        ];
        let choice = choose(&found, Policy::Auto).unwrap();
        assert_eq!(choice.backend, Backend::Bpf);
        assert_eq!(choice.rejected.len(), 2);
    }

    #[test]
    fn a_forced_backend_is_never_replaced() {
        let found = [
            candidate(Backend::Pidfd, Ok(Survives::WithDescriptors)),
            candidate(Backend::Bpf, Err("bpffs is not mounted")),
        ];
        let refused = choose(&found, Policy::Only(Backend::Bpf)).unwrap_err();
        assert!(
            refused.to_string().contains("bpffs is not mounted"),
            "{refused}"
        );
    }
}

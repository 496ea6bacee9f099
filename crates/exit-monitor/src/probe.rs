//! What probing a backend finds: features tried on this kernel and what they add up to.
//! Owns the shape of the answer; the backends do the trying.

use serde::{Deserialize, Serialize};

use crate::{Backend, Guarantees, Survives};

/// One kernel feature, tried on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Feature {
    /// Its name, as the man pages have it.
    pub name: String,
    /// The kernel it came with, such as "5.3".
    pub since: String,
    /// What we need it for.
    pub used_for: String,
    /// Whether the try succeeded.
    pub state: FeatureState,
}

/// The outcome of trying a feature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeatureState {
    /// It works.
    Present,
    /// It does not.
    Missing {
        /// What the kernel answered.
        why: String,
        /// What an administrator can do, if anything.
        remedy: Option<String>,
    },
}

impl Feature {
    /// A feature from the outcome of trying it.
    pub fn tried(
        name: &str,
        since: &str,
        used_for: &str,
        outcome: Result<(), (String, Option<String>)>,
    ) -> Self {
        let state = match outcome {
            Ok(()) => FeatureState::Present,
            Err((why, remedy)) => FeatureState::Missing { why, remedy },
        };
        Self {
            name: name.into(),
            since: since.into(),
            used_for: used_for.into(),
            state,
        }
    }

    /// Whether it works.
    pub fn is_present(&self) -> bool {
        self.state == FeatureState::Present
    }
}

/// What a backend can do on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Availability {
    /// Which backend.
    pub backend: Backend,
    /// Everything that was tried.
    pub features: Vec<Feature>,
    /// What it would promise, or why it cannot run, in one line that names what is missing.
    pub verdict: Result<Guarantees, String>,
    /// What an administrator can do to make it run, or run better.
    pub remedies: Vec<String>,
}

impl Availability {
    /// What is not lost with the watcher; nothing is kept by a backend that cannot run.
    pub fn survives(&self) -> Survives {
        let promised = self.verdict.as_ref();
        promised.map_or(Survives::Nothing, |promised| promised.survives)
    }
}

//! Names from outside that become keys and paths: [`Namespace`], [`ContainerId`], [`ExecId`],
//! [`SandboxId`].
//! A value of these types is proof that it was checked; nothing else may be joined to a path
//! (invariant 10).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The longest identifier containerd accepts (`identifiers.Validate`).
const MAX_LENGTH: usize = 76;

/// A name that is not an identifier.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} {name:?} is not valid: {why}")]
pub struct InvalidId {
    what: &'static str,
    name: String,
    why: &'static str,
}

/// containerd's rule, a little wider: letters, digits, and `.`, `_`, `-` after the first character.
/// No slash, no leading dot, never empty: safe as one path component.
fn check(what: &'static str, name: &str) -> Result<(), InvalidId> {
    let refuse = |why| {
        let shown = name.chars().take(2 * MAX_LENGTH).collect();
        Err(InvalidId {
            what,
            name: shown,
            why,
        })
    };
    if name.is_empty() {
        return refuse("it is empty");
    }
    if name.len() > MAX_LENGTH {
        return refuse("it is longer than 76 bytes");
    }
    if !name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    {
        return refuse("only letters, digits, '.', '_' and '-' are allowed");
    }
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return refuse("it must begin with a letter or a digit");
    }
    Ok(())
}

macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Box<str>);

        impl $name {
            /// The checked text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(name: &str) -> Result<Self, InvalidId> {
                check($what, name)?;
                Ok(Self(name.into()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(name: String) -> Result<Self, InvalidId> {
                check($what, &name)?;
                Ok(Self(name.into_boxed_str()))
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0.into_string()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

identifier!(
    /// containerd's namespace: ids are unique only within one.
    Namespace,
    "namespace"
);
identifier!(
    /// The id of a container, and so of its one task.
    ContainerId,
    "container id"
);
identifier!(
    /// The id of an additional process in a container.
    ExecId,
    "exec id"
);
identifier!(
    /// The id of a sandbox: a pod.
    SandboxId,
    "sandbox id"
);

/// Which sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SandboxKey {
    /// Its namespace.
    pub namespace: Namespace,
    /// Its id.
    pub id: SandboxId,
}

impl fmt::Display for SandboxKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.id)
    }
}

/// Which task.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskKey {
    /// Its namespace.
    pub namespace: Namespace,
    /// Its container.
    pub id: ContainerId,
}

impl fmt::Display for TaskKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.id)
    }
}

/// Which process of which task: the init if `exec` is `None`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProcessKey {
    /// The task.
    pub task: TaskKey,
    /// The exec, or the init.
    pub exec: Option<ExecId>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_their_directory_are_refused() {
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "/a",
            "-a",
            "_a",
            "a\0b",
            "a b",
            "ä",
            &"a".repeat(77),
        ] {
            assert!(bad.parse::<ContainerId>().is_err(), "{bad:?} was accepted");
        }
        for good in ["a", "k8s.io", "moby", "A-1_b.c", &"a".repeat(76)] {
            assert!(good.parse::<ContainerId>().is_ok(), "{good:?} was refused");
        }
    }
}

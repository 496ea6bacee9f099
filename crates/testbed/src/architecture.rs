//! [`Architecture`]: a processor that we build and test for, by each of its names. Owns the names
//! alone; how programs for it come about is `cross`'s.

use clap::ValueEnum;

/// A processor architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Architecture {
    /// amd64
    #[value(name = "x86_64", alias = "amd64")]
    X86_64,
    /// arm64
    #[value(name = "aarch64", alias = "arm64")]
    Aarch64,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::X86_64, Self::Aarch64];

    /// This machine's, if it is one of them.
    pub fn native() -> Option<Self> {
        let mut all = Self::ALL.into_iter();
        all.find(|architecture| architecture.name() == std::env::consts::ARCH)
    }

    /// As the kernel, Rust and RPM call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// As Debian calls it.
    pub const fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    /// What compilers and the names of Debian's directories call it.
    pub const fn tuple(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-linux-gnu",
            Self::Aarch64 => "aarch64-linux-gnu",
        }
    }

    /// What cargo calls it.
    pub const fn target(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-linux-gnu",
            Self::Aarch64 => "aarch64-unknown-linux-gnu",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_names_of_an_architecture_are_understood() {
        for architecture in Architecture::ALL {
            for name in [architecture.name(), architecture.debian()] {
                assert_eq!(Architecture::from_str(name, false), Ok(architecture));
            }
        }
    }
}

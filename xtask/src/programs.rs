//! [`Programs`]: what is shipped, built for this machine or for another architecture, with the
//! tools that can read it. Owns where they are; how they are built is testbed's.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use clap::Args;
use testbed::architecture::Architecture;
use testbed::cross::Toolchain;
use testbed::machine;
use testbed::products::{self, Profile};

/// The programs, which every package has.
pub(crate) const NAMES: [&str; 2] = ["embedshimd", "containerd-shim-embed-v1"];

/// Options of the commands that build what is shipped
#[derive(Args, Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    /// Build for this architecture instead of the machine's own
    #[arg(long, value_enum, value_name = "ARCH")]
    arch: Option<Architecture>,
}

/// Built programs.
#[derive(Debug)]
pub(crate) struct Programs {
    directory: PathBuf,
    /// Of those for another architecture.
    toolchain: Option<Toolchain>,
    /// A daemon that this machine can run: it has the man pages in it.
    runnable: PathBuf,
}

impl Programs {
    /// Those in this directory, which run on this machine.
    pub(crate) fn of_this_machine(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            toolchain: None,
            runnable: directory.join("embedshimd"),
        }
    }

    /// Builds what is shipped, after installing what that needs.
    pub(crate) fn build(options: Options) -> anyhow::Result<Self> {
        machine::prepare()?;
        Self::build_as(options.arch, Profile::Release)
    }

    /// Builds them for an architecture, or for this machine.
    pub(crate) fn build_as(
        architecture: Option<Architecture>,
        profile: Profile,
    ) -> anyhow::Result<Self> {
        let toolchain = architecture.map(Toolchain::of).transpose()?.flatten();
        println!("Building embedshimd ({})", profile.name());
        let own = Self::of_this_machine(&products::build(profile)?);
        let Some(toolchain) = toolchain else {
            return Ok(own);
        };
        println!(
            "The same for {}, with {} for its documents",
            toolchain.architecture().name(),
            own.runnable.display()
        );
        Ok(Self {
            directory: toolchain.build(profile)?,
            toolchain: Some(toolchain),
            ..own
        })
    }

    /// The directory that they are in.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Those that were built for this machine beside them.
    pub(crate) fn own(&self) -> Self {
        let directory = self.runnable.parent();
        Self::of_this_machine(directory.unwrap_or(&self.directory))
    }

    /// The toolchain that has made them, if they are for another architecture.
    pub(crate) fn toolchain(&self) -> Option<&Toolchain> {
        self.toolchain.as_ref()
    }

    /// Copies one of them without its symbols.
    pub(crate) fn strip(&self, name: &str, target: &Path) -> anyhow::Result<()> {
        products::strip_by(&self.tool("strip"), &self.directory.join(name), target)
    }

    /// A program of binutils that reads them.
    pub(crate) fn tool(&self, name: &str) -> String {
        let other = self.toolchain.as_ref();
        other.map_or_else(|| name.to_owned(), |toolchain| toolchain.tool(name))
    }

    /// The architecture as the kernel, Rust and RPM call it.
    pub(crate) fn architecture(&self) -> &'static str {
        let other = self.toolchain.as_ref();
        other.map_or(std::env::consts::ARCH, |toolchain| {
            toolchain.architecture().name()
        })
    }

    /// The same as Debian calls it.
    pub(crate) fn debian_architecture(&self) -> anyhow::Result<String> {
        if let Some(toolchain) = &self.toolchain {
            return Ok(toolchain.architecture().debian().to_owned());
        }
        let mut dpkg = Command::new("dpkg");
        let output = dpkg.arg("--print-architecture").output();
        let output = output.context("cannot run dpkg")?;
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    /// Writes man pages and shell completions below a directory.
    pub(crate) fn write_documents(&self, share: &Path) -> anyhow::Result<()> {
        let mut documents = Command::new(&self.runnable);
        documents
            .arg("documents")
            .arg(share)
            .stdout(Stdio::null())
            .stdin(Stdio::null());
        let status = documents.status();
        let status = status.with_context(|| format!("cannot run {documents:?}"))?;
        ensure!(status.success(), "{documents:?} failed");
        Ok(())
    }
}

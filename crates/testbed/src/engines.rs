//! [`Engine`]: Docker of a release of Debian, fetched beside the machine's own programs. Docker is
//! never installed: its package would start a daemon.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use crate::releases::{Release, Suite};

/// From this version on dockerd takes any runtime by its containerd type.
const TAKES_TYPES: u32 = 23;

/// dockerd and its client, unpacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Engine {
    root: PathBuf,
}

impl Engine {
    /// The one of the same release as a containerd, fetched if it is not there yet.
    pub fn fetch(release: Release) -> anyhow::Result<Self> {
        let (suite, packages) = packages(release);
        Ok(Self {
            root: suite.unpack(packages)?,
        })
    }

    /// The same if it was fetched before.
    pub fn fetched(release: Release) -> Option<Self> {
        let (suite, _) = packages(release);
        suite.is_unpacked().then(|| Self::at(suite.unpacked()))
    }

    /// One that is unpacked below this directory.
    pub fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// The directory that it is unpacked in.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The client.
    pub fn docker(&self) -> Command {
        Command::new(self.root.join("usr/bin/docker"))
    }

    /// The daemon. The only library that may not be on this machine is unpacked beside it.
    pub fn dockerd(&self) -> Command {
        let mut dockerd = Command::new(self.root.join("usr/sbin/dockerd"));
        let libraries = format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH);
        let libraries = self.root.join(libraries);
        if libraries.is_dir() {
            dockerd.env("LD_LIBRARY_PATH", libraries);
        }
        dockerd
    }

    /// Its version, such as 20.10.24.
    pub fn version(&self) -> anyhow::Result<String> {
        let output = self.dockerd().arg("--version").output();
        let output = output.context("cannot run dockerd")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text
            .strip_prefix("Docker version ")
            .and_then(|rest| rest.split(['+', ',', ' ']).next())
            .with_context(|| format!("dockerd --version: {output:?}"))?;
        Ok(version.to_owned())
    }

    /// Whether it takes a runtime by its containerd type. An older one knows
    /// `io.containerd.runc.v2` only.
    pub fn takes_types(&self) -> anyhow::Result<bool> {
        let version = self.version()?;
        let major = version
            .split('.')
            .next()
            .and_then(|major| major.parse().ok());
        let major: u32 = major.with_context(|| format!("dockerd's version is {version}"))?;
        Ok(major >= TAKES_TYPES)
    }
}

fn packages(release: Release) -> (Suite, &'static [&'static str]) {
    match release {
        Release::Installed => (
            Suite::new("docker", "bookworm"),
            &["docker.io", "libdevmapper1.02.1"],
        ),
        Release::Trixie => (Suite::new("docker", "trixie"), &["docker.io", "docker-cli"]),
        Release::Sid => (Suite::new("docker", "sid"), &["docker.io", "docker-cli"]),
    }
}

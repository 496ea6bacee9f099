//! Containerds of other releases of Debian, beside the machine's own: fetched and verified by apt with lists of its own,
//! unpacked into the cache, and run by their own dynamic loader. Nothing of the system is changed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use crate::products::workspace;

const MIRROR: &str = "http://deb.debian.org/debian";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// The daemon, and what it is linked to.
const PACKAGES: [&str; 2] = ["containerd", "libc6"];
const PROGRAMS: [&str; 3] = ["containerd", "ctr", "containerd-shim-runc-v2"];

/// A release of Debian whose containerd we test with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// What is installed here: 1.6 on Debian 12.
    Installed,
    /// Debian 13, with 1.7.
    Trixie,
    /// Debian's development release, with 2.1 and later.
    Sid,
}

impl Release {
    /// All of them, oldest first.
    pub const ALL: [Self; 3] = [Self::Installed, Self::Trixie, Self::Sid];

    fn suite(self) -> Option<&'static str> {
        match self {
            Self::Installed => None,
            Self::Trixie => Some("trixie"),
            Self::Sid => Some("sid"),
        }
    }

    /// The directory with its programs, fetched if they are not there yet; none for what is installed.
    pub fn programs(self) -> anyhow::Result<Option<PathBuf>> {
        let Some(suite) = self.suite() else {
            return Ok(None);
        };
        let cache = workspace().join("target/containerd").join(suite);
        let programs = cache.join("bin");
        if !programs.join("ctr").exists() {
            println!(
                "Fetching containerd of Debian {suite} into {}",
                cache.display()
            );
            fetch(suite, &cache)
                .with_context(|| format!("cannot fetch containerd of Debian {suite}"))?;
            wrap(&cache, &programs)?;
        }
        Ok(Some(programs))
    }

    /// Its version, such as 1.7.24.
    pub fn version(self) -> anyhow::Result<String> {
        let program = self.programs()?.map_or_else(
            || "containerd".into(),
            |directory| directory.join("containerd"),
        );
        let output = Command::new(program)
            .arg("--version")
            .output()
            .context("cannot run containerd")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text
            .split_whitespace()
            .nth(2)
            .with_context(|| format!("containerd --version: {text}"))?;
        Ok(version
            .split(['~', '+'])
            .next()
            .unwrap_or(version)
            .to_owned())
    }
}

fn fetch(suite: &str, cache: &Path) -> anyhow::Result<()> {
    for directory in [
        "state/lists/partial",
        "cache/archives/partial",
        "packages",
        "root",
    ] {
        fs::create_dir_all(cache.join(directory))?;
    }
    fs::write(
        cache.join("sources.list"),
        format!("deb [signed-by={KEYRING}] {MIRROR} {suite} main\n"),
    )?;
    apt(cache, &["update"])?;
    let download: Vec<&str> = ["download"].into_iter().chain(PACKAGES).collect();
    apt(cache, &download)?;
    for package in fs::read_dir(cache.join("packages"))? {
        let mut unpack = Command::new("dpkg-deb");
        run(unpack
            .arg("--extract")
            .arg(package?.path())
            .arg(cache.join("root")))?;
    }
    Ok(())
}

/// apt with its lists, its cache and its idea of what is installed (nothing) below `cache`.
fn apt(cache: &Path, arguments: &[&str]) -> anyhow::Result<()> {
    let mut apt = Command::new("apt-get");
    let options = [
        ("Dir::Etc::sourcelist", cache.join("sources.list")),
        ("Dir::Etc::sourceparts", "/dev/null".into()),
        ("Dir::State", cache.join("state")),
        ("Dir::State::status", "/dev/null".into()),
        ("Dir::Cache", cache.join("cache")),
        ("APT::Sandbox::User", "root".into()),
        ("Acquire::Languages", "none".into()),
    ];
    for (name, value) in options {
        apt.arg("-o").arg(format!("{name}={}", value.display()));
    }
    run(apt
        .arg("--quiet")
        .args(arguments)
        .current_dir(cache.join("packages")))
}

/// Scripts that start each program by the loader it was linked for.
fn wrap(cache: &Path, programs: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(programs)?;
    let root = cache.join("root");
    let libraries = root.join(format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH));
    let loader = fs::read_dir(&libraries)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("ld-linux"))
        })
        .context("the C library's package has no loader")?;
    for program in PROGRAMS {
        let script = format!(
            "#!/bin/sh\nexec '{}' --library-path '{}' --argv0 \"$0\" '{}' \"$@\"\n",
            loader.display(),
            libraries.display(),
            root.join("usr/bin").join(program).display(),
        );
        let path = programs.join(program);
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?} failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

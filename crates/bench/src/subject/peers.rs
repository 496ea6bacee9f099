//! Which subjects there are on this machine, and why others are not: each has to take a container
//! through a life before it is measured.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use testbed::bench::Options;
use testbed::products::workspace;
use testbed::releases::Release;

use super::{Bare, Ground, Shim, Subject};
use crate::report::machine::said_by;
use crate::report::{FLOOR, OURS, SubjectInfo};

/// Where `cargo install --root target/peers containerd-runc-shim` puts the Rust shim.
const RUST_SHIM: &str = "target/peers/bin";
/// Where Debian's containerd has its shim.
const INSTALLED_SHIM: &str = "/usr/bin/containerd-shim-runc-v2";

/// The subjects, and what is said of all that were thought of.
#[derive(Debug)]
pub(crate) struct Chosen {
    pub(crate) subjects: Vec<Subject>,
    pub(crate) infos: Vec<SubjectInfo>,
}

impl Chosen {
    pub(crate) fn find(&self, name: &str) -> Option<&Subject> {
        self.subjects.iter().find(|subject| subject.name() == name)
    }
}

/// One that may turn out not to be there.
struct Candidate {
    name: &'static str,
    find: fn(&Path) -> anyhow::Result<Subject>,
    version: fn(&Path) -> String,
    /// Takes time to fetch, or to be measured.
    is_for_full_runs: bool,
}

const CANDIDATES: [Candidate; 7] = [
    Candidate {
        name: FLOOR,
        find: |_| runtime(FLOOR, "runc"),
        version: |_| said_by("runc", &["--version"]),
        is_for_full_runs: false,
    },
    Candidate {
        name: OURS,
        find: |binaries| shim(OURS, &binaries.join("containerd-shim-embed-v1")),
        version: |binaries| {
            let daemon = binaries.join("embedshimd");
            said_by(&daemon.to_string_lossy(), &["--version"])
        },
        is_for_full_runs: false,
    },
    Candidate {
        name: "go 1.6",
        find: |_| shim("go 1.6", Path::new(INSTALLED_SHIM)),
        version: |_| go(Release::Installed),
        is_for_full_runs: false,
    },
    Candidate {
        name: "go 1.7",
        find: |_| fetched("go 1.7", Release::Trixie),
        version: |_| go(Release::Trixie),
        is_for_full_runs: true,
    },
    Candidate {
        name: "go 2.1",
        find: |_| fetched("go 2.1", Release::Sid),
        version: |_| go(Release::Sid),
        is_for_full_runs: true,
    },
    Candidate {
        name: "rust",
        find: |_| shim("rust", &rust_shim()?),
        version: |_| "containerd-runc-shim of rust-extensions, from crates.io".into(),
        is_for_full_runs: false,
    },
    Candidate {
        name: "crun",
        find: |_| runtime("crun", "crun"),
        version: |_| said_by("crun", &["--version"]),
        is_for_full_runs: false,
    },
];

/// Those that are asked for, each after a trial.
pub(crate) fn choose(
    options: &Options,
    ground: &Ground,
    binaries: &Path,
) -> anyhow::Result<Chosen> {
    let mut chosen = Chosen {
        subjects: Vec::new(),
        infos: Vec::new(),
    };
    for candidate in CANDIDATES {
        let is_ours = [FLOOR, OURS].contains(&candidate.name);
        let is_wanted = is_ours
            || if options.peers.is_empty() {
                !(options.counts_only || options.quick && candidate.is_for_full_runs)
            } else {
                options.peers.iter().any(|peer| peer == candidate.name)
            };
        if !is_wanted {
            continue;
        }
        let found = (candidate.find)(binaries).and_then(|subject| {
            try_out(&subject, ground)?;
            Ok(subject)
        });
        let skipped = match found {
            Ok(subject) => {
                chosen.subjects.push(subject);
                None
            }
            Err(error) if is_ours => return Err(error.context(candidate.name)),
            Err(error) => Some(first_lines(&error)),
        };
        if let Some(reason) = &skipped {
            println!("{} is skipped: {reason}", candidate.name);
        }
        chosen.infos.push(SubjectInfo {
            name: candidate.name.into(),
            what: (candidate.version)(binaries),
            skipped,
        });
    }
    Ok(chosen)
}

/// What it says on the outermost levels, without the command.
fn first_lines(error: &anyhow::Error) -> String {
    let said = error.chain().take(2).map(ToString::to_string);
    let said: Vec<String> = said.map(|text| text.trim().to_owned()).collect();
    said.join(": ")
}

fn try_out(subject: &Subject, ground: &Ground) -> anyhow::Result<()> {
    let id = format!("try-{}", subject.name().replace([' ', '.'], ""));
    let bundle = ground.bundle(&id)?;
    let mut container = subject.launch(ground, &id, bundle)?;
    container.create()?;
    container.start()?;
    container.exec()?;
    container.end()
}

fn runtime(name: &str, program: &str) -> anyhow::Result<Subject> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates = std::env::split_paths(&path).map(|directory| directory.join(program));
    let found = candidates.find(|candidate| candidate.is_file());
    let found = found.with_context(|| format!("{program} is not installed"))?;
    Ok(Subject::Bare(Bare::new(name, &found)))
}

fn shim(name: &str, launcher: &Path) -> anyhow::Result<Subject> {
    if !launcher.is_file() {
        bail!("there is no {}", launcher.display());
    }
    Ok(Subject::Shim(Shim::new(name, launcher)))
}

fn fetched(name: &str, release: Release) -> anyhow::Result<Subject> {
    release.programs()?;
    shim(name, &release.runc_v2().context("it is not fetched")?)
}

/// Its name has changed from one version to the other.
fn rust_shim() -> anyhow::Result<PathBuf> {
    let directory = workspace().join(RUST_SHIM);
    let programs = std::fs::read_dir(&directory)
        .into_iter()
        .flatten()
        .flatten();
    let found = programs.map(|entry| entry.path()).next();
    found.context("it is not built: cargo install --root target/peers containerd-runc-shim")
}

fn go(release: Release) -> String {
    let version = release.version().unwrap_or_default();
    format!("containerd-shim-runc-v2 of containerd {version}")
}

//! [`Stage`]: what a test gets, and [`Test`]: what it is. Owns the built binaries and the image,
//! made once for all.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use testbed::engines::Engine;
use testbed::image;
use testbed::products::{self, Profile};
use testbed::releases::Release;
use testbed::sandbox::{EMBEDSHIM, Sandbox};

/// What a test needs to begin.
#[derive(Debug)]
pub struct Stage {
    binaries: PathBuf,
    archive: OnceLock<PathBuf>,
    examples: OnceLock<Result<PathBuf, String>>,
    runtime: String,
    programs: Option<PathBuf>,
    directory: tempfile::TempDir,
}

/// For which runtimes a test is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Any shim: it tests the contract with containerd.
    AnyRuntime,
    /// Ours: it tests what only we promise.
    EmbedshimOnly,
    /// Ours, without a containerd: a run with another release's does not repeat it.
    WithoutContainerd,
    /// Ours, on a machine whose cgroups are version 2 and nothing else.
    UnifiedCgroups,
    /// Another containerd than the installed one: it tests the way from one to the other.
    OtherContainerd,
    /// Ours, with a containerd that has sandbox controllers: 2.0 and newer.
    ContainerdTwo,
}

/// One end-to-end test. Its name is the invariant it guards.
#[derive(Clone, Copy, Debug)]
pub struct Test {
    /// Module and name.
    pub name: &'static str,
    /// For which runtimes.
    pub scope: Scope,
    /// The test.
    pub run: fn(&Stage) -> anyhow::Result<()>,
}

impl Stage {
    /// Builds what is not built yet. The runtime is `EMBEDSHIM_TEST_RUNTIME` or ours.
    pub fn set() -> anyhow::Result<Self> {
        let binaries = match std::env::var_os("EMBEDSHIM_TEST_BINARIES") {
            Some(directory) => directory.into(),
            None => products::build(Profile::Dev)?,
        };
        let directory = tempfile::tempdir()?;
        let runtime = std::env::var("EMBEDSHIM_TEST_RUNTIME").unwrap_or_else(|_| EMBEDSHIM.into());
        Ok(Self {
            binaries,
            archive: OnceLock::new(),
            examples: OnceLock::new(),
            runtime,
            programs: std::env::var_os("EMBEDSHIM_TEST_PROGRAMS").map(PathBuf::from),
            directory,
        })
    }

    /// A containerd of this test's own, with the image.
    pub fn sandbox(&self) -> anyhow::Result<Sandbox> {
        self.sandbox_with(&[])
    }

    /// The same, with these variables in its environment.
    pub fn sandbox_with(&self, environment: &[(&str, &str)]) -> anyhow::Result<Sandbox> {
        let mut sandbox = self.bare_sandbox()?;
        for (name, value) in environment {
            sandbox.set_environment(name, value);
        }
        sandbox.start_containerd()?;
        sandbox.import(self.archive())?;
        Ok(sandbox)
    }

    /// A sandbox in which nothing runs yet.
    pub fn bare_sandbox(&self) -> anyhow::Result<Sandbox> {
        let mut sandbox = Sandbox::new(&self.binaries, &self.runtime)?;
        sandbox.use_programs(self.programs.clone());
        Ok(sandbox)
    }

    /// Where the containerd of another release is, if this run is about one.
    pub fn programs(&self) -> Option<PathBuf> {
        self.programs.clone()
    }

    /// The image's archive, made when it is first asked for.
    ///
    /// # Panics
    ///
    /// If it cannot be made.
    #[expect(clippy::panic, reason = "a test without its image has failed")]
    pub fn archive(&self) -> &Path {
        self.archive.get_or_init(|| {
            image::build(self.directory.path())
                .unwrap_or_else(|error| panic!("no image: {error:#}"))
        })
    }

    /// The root file system in it, as an archive without anything around it.
    pub fn layer(&self) -> PathBuf {
        self.archive().with_file_name("layer.tar")
    }

    /// Where our binaries are.
    pub fn binary(&self, name: &str) -> PathBuf {
        self.binaries.join(name)
    }

    /// An example of the library, built when it is first asked for.
    pub fn example(&self, name: &str) -> anyhow::Result<PathBuf> {
        let built = self
            .examples
            .get_or_init(|| products::build_examples().map_err(|error| format!("{error:#}")));
        let directory = built.as_ref().map_err(|error| anyhow::anyhow!("{error}"))?;
        Ok(directory.join(name))
    }

    /// The runtime under test.
    pub fn runtime(&self) -> &str {
        &self.runtime
    }
}

/// Docker, if it was fetched: that of `EMBEDSHIM_TEST_DOCKER`, or Debian 12's.
pub fn docker() -> Option<Engine> {
    match std::env::var_os("EMBEDSHIM_TEST_DOCKER") {
        Some(root) => Path::new(&root).is_dir().then(|| Engine::at(root.into())),
        None => Engine::fetched(Release::Installed),
    }
}

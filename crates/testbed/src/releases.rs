//! Programs of other releases of Debian, beside the machine's own: fetched and verified by apt with
//! lists of its own, unpacked into the cache, and run with their own loader and libraries, by a
//! script or as a copy that names them. Nothing of the system is changed.

mod tree;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use crate::architecture::Architecture;
use crate::machine::run;
use crate::products::workspace;

const MIRROR: &str = "http://deb.debian.org/debian";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// What containerd's programs are linked to is in the second package.
const CONTAINERD: [&str; 2] = ["containerd", "libc6"];
/// The file that says that a directory of the cache has everything.
const COMPLETE: &str = "complete";
/// Changes which loader and libraries a program asks for.
const PATCHELF: &str = "patchelf";
const CONTAINERD_PROGRAMS: [&str; 3] = [
    "usr/bin/containerd",
    "usr/bin/ctr",
    "usr/bin/containerd-shim-runc-v2",
];

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

    /// The release whose programs are in this directory.
    pub fn of(programs: Option<&Path>) -> Option<Self> {
        let is_its = |release: &Self| {
            let fetched = release.suite().map(|suite| Suite::new("containerd", suite));
            fetched.map(|suite| suite.scripts()).as_deref() == programs
        };
        Self::ALL.into_iter().find(is_its)
    }

    /// The directory with its programs, fetched if they are not there yet; none for what is
    /// installed.
    pub fn programs(self) -> anyhow::Result<Option<PathBuf>> {
        let Some(suite) = self.suite() else {
            return Ok(None);
        };
        let packages = Suite::new("containerd", suite);
        packages.fetch(&CONTAINERD, &CONTAINERD_PROGRAMS).map(Some)
    }

    /// Its containerd's own shim for runc, as it is: it needs no newer libraries than the installed
    /// ones, and executes itself again. None for what is installed.
    pub fn runc_v2(self) -> Option<PathBuf> {
        let root = Suite::new("containerd", self.suite()?).cache.join("root");
        Some(root.join("usr/bin/containerd-shim-runc-v2"))
    }

    /// Its version, such as 1.7.24.
    pub fn version(self) -> anyhow::Result<String> {
        let program = self.programs()?.map_or_else(
            || PathBuf::from("containerd"),
            |directory| directory.join("containerd"),
        );
        version_of(&program)
    }
}

/// The version that a containerd says it is, without what a distribution has added.
pub fn version_of(program: &Path) -> anyhow::Result<String> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text
        .split_whitespace()
        .nth(2)
        .with_context(|| format!("{} --version: {text}", program.display()))?;
    let own = version.split(['~', '+']).next().unwrap_or(version);
    Ok(own.trim_start_matches('v').to_owned())
}

/// The directory with a CRIU that knows today's kernels; Debian 12's does not know 6.18.
pub fn criu() -> anyhow::Result<PathBuf> {
    Suite::new("criu", "sid").fetch(&["criu"], &["usr/sbin/criu"])
}

/// The directory with a `runc` that knows what Debian 12's does not: mounts with mapped owners,
/// which pods with user namespaces need.
pub fn runc() -> anyhow::Result<PathBuf> {
    Suite::new("runc", "sid").fetch_adapted(&["runc", PATCHELF], &["usr/sbin/runc"])
}

/// The directory with Prometheus, fetched if it is not there yet. It is never installed: its
/// package would start a server.
pub fn prometheus() -> anyhow::Result<PathBuf> {
    let packages = prometheus_packages().unpack(&["prometheus"])?;
    Ok(packages.join("usr/bin"))
}

/// The same if it was fetched before.
pub fn fetched_prometheus() -> Option<PathBuf> {
    let packages = prometheus_packages();
    packages
        .is_unpacked()
        .then(|| packages.unpacked().join("usr/bin"))
}

fn prometheus_packages() -> Suite {
    Suite::new("prometheus", "bookworm")
}

/// Packages of another release, beside the system.
#[derive(Debug)]
pub struct Suite {
    release: &'static str,
    cache: PathBuf,
    /// Whose packages these are, the first one's where none is named; of this machine's, if there
    /// are none.
    architectures: Vec<&'static str>,
}

impl Suite {
    /// The release, with a cache for `what` is wanted of it.
    pub fn new(what: &str, release: &'static str) -> Self {
        Self {
            release,
            cache: workspace()
                .join("target/debian")
                .join(format!("{what}-{release}")),
            architectures: Vec::new(),
        }
    }

    /// The same for these architectures, with a cache of its own: packages are of the first one,
    /// unless `:` and another one follow their names.
    pub fn of_architectures(what: &str, suite: &'static str, all: &[Architecture]) -> Self {
        let names = all.iter().map(|architecture| architecture.debian());
        let architectures: Vec<&str> = names.collect();
        let what = format!("{what}-{}", architectures.join("-"));
        Self {
            architectures,
            ..Self::new(&what, suite)
        }
    }

    /// The release's name.
    pub fn name(&self) -> &str {
        self.release
    }

    /// The cache.
    pub fn directory(&self) -> &Path {
        &self.cache
    }

    /// The names of its packages that begin so.
    pub fn package_names(&self, prefix: &str) -> anyhow::Result<Vec<String>> {
        if !self.cache.join("sources.list").exists() {
            self.update()?;
        }
        let mut apt = Command::new("apt-cache");
        let output = apt
            .args(self.options())
            .args(["pkgnames", prefix])
            .output()
            .context("cannot run apt-cache")?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// Fetches one package alone, verified by apt, and returns the directory that it is unpacked
    /// in.
    pub fn download_and_unpack(&self, package: &str) -> anyhow::Result<PathBuf> {
        let directory = self.cache.join("unpacked");
        let _ = fs::remove_dir_all(&directory);
        self.download_and_extract(package, &directory)?;
        Ok(directory)
    }

    fn download_and_extract(&self, package: &str, into: &Path) -> anyhow::Result<()> {
        let directory = self.cache.join("download");
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory)?;
        fs::create_dir_all(into)?;
        let mut apt = Command::new("apt-get");
        apt.args(self.options())
            .args(["--quiet", "download", package]);
        run(apt.current_dir(&directory))?;
        for file in fs::read_dir(&directory)?.flatten() {
            run(Command::new("dpkg-deb")
                .arg("--extract")
                .arg(file.path())
                .arg(into))?;
        }
        Ok(fs::remove_dir_all(&directory)?)
    }

    fn update(&self) -> anyhow::Result<()> {
        for directory in ["state/lists/partial", "cache/archives/partial", "root"] {
            fs::create_dir_all(self.cache.join(directory))?;
        }
        let sources = format!("deb [signed-by={KEYRING}] {MIRROR} {} main\n", self.release);
        fs::write(self.cache.join("sources.list"), sources)?;
        self.apt(&["update"]).inspect_err(|_| {
            // The next one is to try again.
            let _ = fs::remove_file(self.cache.join("sources.list"));
        })
    }

    /// apt with its lists, its cache and its idea of what is installed (nothing) below the cache.
    fn options(&self) -> Vec<String> {
        let options = [
            ("Dir::Etc::sourcelist", self.cache.join("sources.list")),
            ("Dir::Etc::sourceparts", "/dev/null".into()),
            ("Dir::State", self.cache.join("state")),
            ("Dir::State::status", "/dev/null".into()),
            ("Dir::Cache", self.cache.join("cache")),
            ("APT::Sandbox::User", "root".into()),
            ("Acquire::Languages", "none".into()),
            ("Acquire::Retries", "3".into()),
        ];
        let arguments = options.map(|(name, value)| format!("--option={name}={}", value.display()));
        let mut arguments = arguments.to_vec();
        if let Some(first) = self.architectures.first() {
            let all = self.architectures.join(",");
            arguments.push(format!("--option=APT::Architecture={first}"));
            arguments.push(format!("--option=APT::Architectures={all}"));
        }
        arguments
    }

    /// Fetches these packages alone, verified by apt, for programs that run with this machine's own
    /// libraries; returns the directory that they are unpacked in. What is there is not fetched
    /// again.
    pub fn unpack(&self, packages: &[&str]) -> anyhow::Result<PathBuf> {
        let directory = self.unpacked();
        let _one_at_a_time = self.lock()?;
        if self.is_unpacked() {
            return Ok(directory);
        }
        println!(
            "Fetching {} of Debian {} into {}",
            packages.join(", "),
            self.release,
            self.cache.display()
        );
        self.update()?;
        for package in packages {
            self.download_and_extract(package, &directory)
                .with_context(|| format!("cannot fetch {package} of Debian {}", self.release))?;
        }
        fs::write(directory.join(COMPLETE), "")?;
        Ok(directory)
    }

    /// Where [`Suite::unpack`] puts them.
    pub fn unpacked(&self) -> PathBuf {
        self.cache.join("packages")
    }

    /// Whether [`Suite::unpack`] has nothing to fetch.
    pub fn is_unpacked(&self) -> bool {
        self.unpacked().join(COMPLETE).exists()
    }

    /// Where [`Suite::fetch`] and [`Suite::fetch_adapted`] put programs.
    fn scripts(&self) -> PathBuf {
        self.cache.join("bin")
    }

    /// Keeps others from fetching into the cache until it is dropped: tests run in parallel, and
    /// each may be the first to ask.
    pub fn lock(&self) -> anyhow::Result<fs::File> {
        fs::create_dir_all(&self.cache)?;
        let lock = fs::File::create(self.cache.join("lock"))?;
        lock.lock()?;
        Ok(lock)
    }

    /// The directory with scripts that start these programs; what is not there yet is fetched.
    fn fetch(&self, packages: &[&str], programs: &[&str]) -> anyhow::Result<PathBuf> {
        self.fetch_and(packages, |into| self.wrap(programs, into))
    }

    /// The directory with copies of these programs that name their loader and libraries themselves:
    /// a program that executes itself again, as OCI runtimes do, is not its script then.
    fn fetch_adapted(&self, packages: &[&str], programs: &[&str]) -> anyhow::Result<PathBuf> {
        self.fetch_and(packages, |into| self.adapt(programs, into))
    }

    fn fetch_and(
        &self,
        packages: &[&str],
        make: impl FnOnce(&Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<PathBuf> {
        let programs = self.scripts();
        let _one_at_a_time = self.lock()?;
        if !programs.join(COMPLETE).exists() {
            println!(
                "Fetching {} of Debian {} into {}",
                packages.join(", "),
                self.release,
                self.cache.display()
            );
            self.download(packages)
                .with_context(|| format!("cannot fetch packages of Debian {}", self.release))?;
            fs::create_dir_all(&programs)?;
            make(&programs)?;
            fs::write(programs.join(COMPLETE), "")?;
        }
        Ok(programs)
    }

    /// Fetches the packages with all they depend on, and unpacks them.
    fn download(&self, packages: &[&str]) -> anyhow::Result<()> {
        self.update()?;
        let install = [
            "install",
            "--yes",
            "--download-only",
            "--no-install-recommends",
        ];
        self.apt(&[&install, packages].concat())?;
        for package in fs::read_dir(self.cache.join("cache/archives"))? {
            let package = package?.path();
            if package
                .extension()
                .is_some_and(|extension| extension == "deb")
            {
                run(Command::new("dpkg-deb")
                    .arg("--extract")
                    .arg(package)
                    .arg(self.cache.join("root")))?;
            }
        }
        Ok(())
    }

    fn apt(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let mut apt = Command::new("apt-get");
        run(apt.args(self.options()).arg("--quiet").args(arguments))
    }

    /// Scripts that start each program by the loader it was linked for.
    fn wrap(&self, programs: &[&str], scripts: &Path) -> anyhow::Result<()> {
        let (libraries, loader) = self.loader()?;
        for program in programs {
            let program = self.cache.join("root").join(program);
            let script = format!(
                "#!/bin/sh\nexec '{}' --library-path '{}' --argv0 \"$0\" '{}' \"$@\"\n",
                loader.display(),
                libraries.display(),
                program.display(),
            );
            let path = scripts.join(program.file_name().unwrap_or_default());
            fs::write(&path, script)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        Ok(())
    }

    /// Copies of the programs, with the loader and the libraries of this release.
    fn adapt(&self, programs: &[&str], into: &Path) -> anyhow::Result<()> {
        let (libraries, loader) = self.loader()?;
        let root = self.cache.join("root");
        for program in programs {
            let program = root.join(program);
            let copy = into.join(program.file_name().unwrap_or_default());
            fs::copy(&program, &copy)?;
            let mut patchelf = Command::new(&loader);
            patchelf.arg("--library-path").arg(&libraries);
            patchelf.arg(root.join("usr/bin").join(PATCHELF));
            patchelf.arg("--set-interpreter").arg(&loader);
            patchelf.arg("--set-rpath").arg(&libraries);
            run(patchelf.arg(&copy))?;
        }
        Ok(())
    }

    /// The directory with the libraries of this release, and the loader in it.
    fn loader(&self) -> anyhow::Result<(PathBuf, PathBuf)> {
        let libraries = format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH);
        let libraries = self.cache.join("root").join(libraries);
        let is_loader = |path: &PathBuf| {
            let name = path.file_name().map(|name| name.to_string_lossy());
            name.is_some_and(|name| name.starts_with("ld-linux"))
        };
        let entries = fs::read_dir(&libraries)?.flatten();
        let loader = entries.map(|entry| entry.path()).find(is_loader);
        let loader = loader.context("the C library's package has no loader")?;
        Ok((libraries, loader))
    }
}

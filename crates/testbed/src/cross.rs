//! [`Toolchain`]: compiles for another architecture than this machine's, by Debian's packages
//! alone. Owns what it is made of: the compiler and the Rust library of Debian's development
//! release; the C library and everything else of the target from Debian 12, so that no program
//! needs a newer C library than one that is built on Debian 12. clang and binutils are this
//! machine's. All that is fetched is below `target`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

use crate::architecture::Architecture;
use crate::machine::{self, on_path, run};
use crate::products::{self, DEV_SELECTION, Profile, build_shipped, cargo};
use crate::releases::Suite;

/// The release whose C library programs are linked to, and whose programs guests run.
const TARGET_SUITE: &str = "bookworm";
/// What compiling for the target needs of it, and what guests run.
const TARGET_PACKAGES: [&str; 8] = [
    "libc6-dev",
    "libgcc-12-dev",
    "libelf-dev",
    "zlib1g-dev",
    "busybox-static",
    "runc",
    "crun",
    "util-linux",
];
/// The release whose Rust compiler is new enough for us.
const RUST_SUITE: &str = "sid";
/// What runs in guests.
const PRODUCTS: [&str; 4] = ["--bin", "embedshimd", "--bin", "containerd-shim-embed-v1"];

/// Compiles for an architecture that is not this machine's.
#[derive(Debug)]
pub struct Toolchain {
    architecture: Architecture,
    compiler: PathBuf,
    linker: PathBuf,
    sysroot: PathBuf,
}

impl Toolchain {
    /// The one for this architecture, fetched if it is not there yet; none where this machine has
    /// that architecture itself.
    pub fn of(architecture: Architecture) -> anyhow::Result<Option<Self>> {
        let Some(host) = host_for(Architecture::native(), architecture)? else {
            return Ok(None);
        };
        Self::fetch(host, architecture).map(Some).with_context(|| {
            format!(
                "programs for {} cannot be built here, which takes packages of Debian",
                architecture.name()
            )
        })
    }

    fn fetch(host: Architecture, architecture: Architecture) -> anyhow::Result<Self> {
        ensure!(on_path("apt-get"), "there is no apt-get");
        machine::prepare_for_arm64_programs()?;
        let sysroot = Suite::of_architectures("sysroot", TARGET_SUITE, &[architecture]);
        let sysroot = sysroot.tree(&TARGET_PACKAGES, &[])?;
        let rust = Suite::of_architectures("rust", RUST_SUITE, &[host, architecture]);
        // The compiler depends on a C compiler, and this machine has one; both libraries are of
        // the same version as it.
        let library = format!("libstd-rust-dev:{}", architecture.debian());
        let rust = rust.tree(&["libstd-rust-dev"], &["rustc", &library])?;
        let scripts = products::target_directory()
            .join("cross")
            .join(architecture.name());
        fs::create_dir_all(&scripts)?;
        let toolchain = Self {
            architecture,
            compiler: scripts.join("rustc"),
            linker: scripts.join("cc"),
            sysroot,
        };
        write_script(&toolchain.compiler, &compiler_script(&rust, host))?;
        let script = linker_script(&toolchain.sysroot, architecture);
        write_script(&toolchain.linker, &script)?;
        run(Command::new(&toolchain.compiler).arg("--version"))?;
        Ok(toolchain)
    }

    /// What it compiles for.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// A directory like the root of a system of that architecture: what programs are linked to, and
    /// what guests run beside them.
    pub fn sysroot(&self) -> &Path {
        &self.sysroot
    }

    /// The C compiler, which also links.
    pub fn c_compiler(&self) -> &Path {
        &self.linker
    }

    /// A program of binutils for the architecture, such as `strip`.
    pub fn tool(&self, name: &str) -> String {
        format!("{}-{name}", self.architecture.tuple())
    }

    /// Cargo with this subcommand. What it makes is apart from what is made for this machine.
    pub fn cargo(&self, subcommand: &str) -> Command {
        let target = self.architecture.target();
        let lower = target.replace('-', "_");
        let mut cargo = cargo();
        cargo
            .arg(subcommand)
            .args(["--target", target])
            .arg("--target-dir")
            .arg(target_directory())
            .env("RUSTC", &self.compiler)
            .env(
                format!("CARGO_TARGET_{}_LINKER", lower.to_uppercase()),
                &self.linker,
            )
            .env(format!("CC_{lower}"), &self.linker)
            .env(format!("AR_{lower}"), self.tool("ar"));
        cargo
    }

    /// Builds `embedshimd` and the launcher and returns the directory they are in.
    pub fn build(&self, profile: Profile) -> anyhow::Result<PathBuf> {
        let directory = match profile {
            Profile::Dev => {
                let mut build = self.cargo("build");
                build.args(DEV_SELECTION).arg("--quiet").args(PRODUCTS);
                let status = build.status().context("cannot run cargo")?;
                ensure!(status.success(), "the products do not build");
                "debug"
            }
            Profile::Release => {
                build_shipped(|subcommand| self.cargo(subcommand))?;
                "release"
            }
        };
        let target = target_directory().join(self.architecture.target());
        Ok(target.join(directory))
    }
}

/// The machine whose compiler is to be fetched; none if it is of that architecture itself.
fn host_for(
    native: Option<Architecture>,
    wanted: Architecture,
) -> anyhow::Result<Option<Architecture>> {
    match (native, wanted) {
        (Some(native), wanted) if native == wanted => Ok(None),
        (Some(host @ Architecture::X86_64), Architecture::Aarch64) => Ok(Some(host)),
        _ => bail!(
            "nothing is built for {} on {}: the one way there is leads from x86_64 to aarch64",
            wanted.name(),
            native.map_or("this machine", Architecture::name)
        ),
    }
}

/// Where cargo puts what is made for other architectures. Not beside what is made for this machine:
/// another compiler makes it.
fn target_directory() -> PathBuf {
    products::target_directory().join("cross")
}

/// Debian's compiler, with the libraries that it was linked for.
fn compiler_script(root: &Path, host: Architecture) -> String {
    let libraries = root.join("usr/lib").join(host.tuple());
    let loader = libraries.join("ld-linux-x86-64.so.2");
    format!(
        "#!/bin/sh\nexec '{}' --library-path '{}' --argv0 \"$0\" '{}' \"$@\"\n",
        loader.display(),
        libraries.display(),
        root.join("usr/bin/rustc").display()
    )
}

/// This machine's clang, which finds headers and libraries in the target's tree only.
fn linker_script(sysroot: &Path, architecture: Architecture) -> String {
    let root = sysroot.display();
    format!(
        "#!/bin/sh\nexec clang --target={} --sysroot='{root}' --gcc-toolchain='{root}/usr' \
         -Wno-unused-command-line-argument \"$@\"\n",
        architecture.tuple()
    )
}

/// Cargo asks a compiler again that has changed.
fn write_script(path: &Path, text: &str) -> anyhow::Result<()> {
    if fs::read_to_string(path).is_ok_and(|before| before == text) {
        return Ok(());
    }
    fs::write(path, text).with_context(|| path.display().to_string())?;
    Ok(fs::set_permissions(
        path,
        fs::Permissions::from_mode(0o755),
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_way_that_there_is_takes_another_toolchain() {
        use Architecture::{Aarch64, X86_64};
        for own in Architecture::ALL {
            assert_eq!(host_for(Some(own), own).unwrap(), None);
        }
        assert_eq!(host_for(Some(X86_64), Aarch64).unwrap(), Some(X86_64));
        for native in [Some(Aarch64), None] {
            let error = host_for(native, X86_64).unwrap_err();
            assert!(error.to_string().contains("x86_64 on"), "{error}");
        }
        if let Some(native) = Architecture::native() {
            assert!(Toolchain::of(native).unwrap().is_none());
        }
    }

    #[test]
    fn headers_and_libraries_are_those_of_the_target() {
        let script = linker_script(Path::new("/r"), Architecture::Aarch64);
        for part in [
            "--target=aarch64-linux-gnu",
            "--sysroot='/r'",
            "--gcc-toolchain='/r/usr'",
        ] {
            assert!(script.contains(part), "{script}");
        }
    }
}

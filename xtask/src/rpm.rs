//! `cargo xtask rpm`: the package for systems with RPM, of the same files as the Debian package, by
//! plain rpmbuild. Owns where these files are there; what the package's scripts do is theirs
//! (`packaging/rpm`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use testbed::machine;
use testbed::products::workspace;

use crate::deb::{self, Packing};
use crate::programs::{self, Programs};

const SPEC: &str = "packaging/rpm/embedshim.spec";
const SCRIPTS: &str = "packaging/rpm";
/// What only dpkg and lintian look at.
const OF_DEBIAN: [&str; 3] = [
    "DEBIAN",
    "usr/share/lintian",
    "usr/share/doc/embedshim/changelog.gz",
];
/// Where Debian has what is elsewhere with RPM, and where it is there.
const ELSEWHERE: [(&str, &str); 2] = [
    ("lib/systemd", "usr/lib/systemd"),
    (
        "usr/share/zsh/vendor-completions",
        "usr/share/zsh/site-functions",
    ),
];
const CONFIGURATION: &str = "/etc/embedshim/config.toml";
/// Directories that belong to no other package.
const OWN: [&str; 3] = [
    "/etc/embedshim",
    "/usr/share/doc/embedshim",
    "/usr/share/doc/embedshim/examples",
];

/// Builds what is shipped, and says where it is.
pub(crate) fn run(options: programs::Options) -> anyhow::Result<()> {
    let programs = Programs::build(options)?;
    let directory = match programs.toolchain() {
        None => "target/rpm".to_owned(),
        Some(toolchain) => format!("target/rpm-{}", toolchain.architecture().name()),
    };
    let package = build(&programs, &workspace().join(directory))?;
    println!("{}", output(rpm().args(["-qpi"]).arg(&package))?);
    println!("{}", package.display());
    Ok(())
}

/// Packs these programs and returns the package's path, which is below the directory.
pub(crate) fn build(programs: &Programs, directory: &Path) -> anyhow::Result<PathBuf> {
    machine::prepare_for_package_checks()?;
    let _ = fs::remove_dir_all(directory);
    fs::create_dir_all(directory)?;
    let version = deb::version()?;
    // The tree of the Debian package, whose documents are made by then.
    let tree = directory.join("root");
    fs::remove_file(deb::build(programs, &version, Packing::Quick, directory)?)?;
    for path in OF_DEBIAN.map(|path| tree.join(path)) {
        let removed = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path));
        removed.with_context(|| path.display().to_string())?;
    }
    for (from, to) in ELSEWHERE {
        let (from, to) = (tree.join(from), tree.join(to));
        fs::create_dir_all(to.parent().context("no directory")?)?;
        fs::rename(&from, to).with_context(|| from.display().to_string())?;
    }
    fs::remove_dir(tree.join("lib"))?;
    let files = directory.join("files");
    fs::write(&files, list(&tree)?)?;
    let spec = fs::read_to_string(workspace().join(SPEC))?.replace("@VERSION@", &version);
    let spec_file = directory.join("embedshim.spec");
    fs::write(&spec_file, spec)?;
    let mut build = Command::new("rpmbuild");
    for (name, value) in [
        ("_topdir", directory.join("build")),
        ("_rpmdir", directory.join("packages")),
        ("tree", tree),
        ("file_list", files),
        ("scripts", workspace().join(SCRIPTS)),
    ] {
        build.args(["--define", &format!("{name} {}", value.display())]);
    }
    // Programs of another system may build it: what it needs is found out by ldd's rules alone.
    let architecture = programs.architecture();
    if programs.toolchain().is_some() {
        build.args(["--target", &format!("{architecture}-linux")]);
    }
    output(build.arg("-bb").arg(&spec_file))?;
    let packages = directory.join("packages").join(architecture);
    let mut found = fs::read_dir(&packages).with_context(|| packages.display().to_string())?;
    let package = found.next().context("rpmbuild has made no package")??;
    Ok(package.path())
}

/// The lines of the spec's `%files`.
fn list(tree: &Path) -> anyhow::Result<String> {
    let mut lines: Vec<String> = OWN.map(|path| format!("%dir {path}")).into();
    let mut files = Vec::new();
    collect(tree, tree, &mut files)?;
    files.sort();
    for file in files {
        let kind = match file.as_str() {
            CONFIGURATION => "%config(noreplace) ",
            file if file.starts_with("/usr/share/doc/") => "%doc ",
            _ => "",
        };
        lines.push(format!("%attr(-, root, root) {kind}{file}"));
    }
    Ok(lines.join("\n") + "\n")
}

fn collect(tree: &Path, directory: &Path, files: &mut Vec<String>) -> anyhow::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(tree, &path, files)?;
        } else {
            files.push(format!("/{}", path.strip_prefix(tree)?.display()));
        }
    }
    Ok(())
}

/// Installs a package of these programs into an empty directory, verifies and removes it; what its
/// scripts say to systemd is looked at, which a stand-in of `systemctl` notes.
pub(crate) fn check(binaries: &Path) -> anyhow::Result<()> {
    let directory = workspace().join("target/rpm-check");
    let package = build(&Programs::of_this_machine(binaries), &directory)?;
    let root = directory.join("system");
    fs::create_dir_all(&root)?;
    let on_system = |arguments: &[&str]| {
        let mut rpm = rpm();
        rpm.arg("--root").arg(&root).args(arguments);
        output(&mut rpm)
    };
    let path = package.display().to_string();
    // Where there is no system to run scripts in, and no package of its libraries.
    on_system(&["--install", "--nodeps", "--noscripts", &path])?;
    let verified = on_system(&["--verify", "--nodeps", "--noscripts", "embedshim"])?;
    ensure!(verified.is_empty(), "{verified}");
    for file in [
        "usr/bin/embedshimd",
        "usr/bin/containerd-shim-embed-v1",
        "usr/lib/systemd/system/embedshimd.socket",
        "usr/share/man/man8/embedshimd.8.gz",
        "etc/embedshim/config.toml",
    ] {
        ensure!(root.join(file).is_file(), "{file} is not installed");
    }
    let configuration = on_system(&["--query", "--configfiles", "embedshim"])?;
    ensure!(configuration == CONFIGURATION, "{configuration}");
    let needed = on_system(&["--query", "--requires", "embedshim"])?;
    ensure!(needed.contains("libc.so.6"), "{needed}");
    on_system(&["--erase", "--nodeps", "--noscripts", "embedshim"])?;
    ensure!(!root.join("etc/embedshim").exists(), "files are left");
    check_scripts(&directory.join("scripts"))?;
    Ok(fs::remove_dir_all(directory)?)
}

/// A system of files alone.
fn check_scripts(directory: &Path) -> anyhow::Result<()> {
    let (state, pins) = (directory.join("run"), directory.join("bpf"));
    let (bin, said) = (directory.join("bin"), directory.join("said"));
    fs::create_dir_all(&bin)?;
    // The daemon is another process after SIGHUP.
    let stand_in = format!(
        "#!/bin/sh\necho \"$@\" >> {said}\ncase \"$*\" in show*) if grep -q HUP {said}; then \
         echo 8; else echo 7; fi;; esac\n",
        said = said.display()
    );
    let systemctl = bin.join("systemctl");
    fs::write(&systemctl, stand_in)?;
    output(Command::new("chmod").arg("755").arg(&systemctl))?;
    let run = |script: &str, number: &str| {
        fs::write(&said, "")?;
        let path = std::env::var("PATH")?;
        let status = Command::new("sh")
            .arg(workspace().join(SCRIPTS).join(script))
            .arg(number)
            .env("PATH", format!("{}:{path}", bin.display()))
            .env("EMBEDSHIM_SYSTEMD_DIR", directory)
            .env("EMBEDSHIM_STATE_DIR", &state)
            .env("EMBEDSHIM_BPFFS_DIR", &pins)
            .stderr(Stdio::null())
            .status()?;
        anyhow::Ok((status.success(), fs::read_to_string(&said)?))
    };
    let (is_done, said) = run("post", "1")?;
    ensure!(
        is_done && said.contains("preset embedshimd.socket"),
        "{said}"
    );
    let (is_done, said) = run("post", "2")?;
    ensure!(
        is_done && said.contains("--signal=HUP") && !said.contains("stop"),
        "{said}"
    );
    // At an upgrade, of the old package.
    for script in ["preun", "postun"] {
        let (is_done, said) = run(script, "1")?;
        ensure!(is_done && said.is_empty(), "{script}: {said}");
    }
    fs::create_dir_all(state.join("tasks"))?;
    fs::create_dir_all(pins.join("run-embedshim"))?;
    let record = state.join("tasks/k8s.io:c.json");
    fs::write(&record, "{}")?;
    let (is_done, said) = run("preun", "0")?;
    ensure!(
        !is_done && said.is_empty(),
        "removed under a container: {said}"
    );
    run("postun", "0")?;
    ensure!(record.exists(), "a record is gone");
    fs::remove_file(record)?;
    let (is_done, said) = run("preun", "0")?;
    ensure!(is_done && said.contains("disable --now"), "{said}");
    run("postun", "0")?;
    ensure!(!state.exists() && !pins.exists(), "something is left");
    Ok(())
}

fn rpm() -> Command {
    Command::new("rpm")
}

fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    ensure!(
        output.status.success(),
        "{command:?} failed: {said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(said)
}

//! What a guest is made of: busybox, the test programs with the libraries they are linked to, runc,
//! crun and unshare, and an init that runs them and says on the console how it went. No disk, no
//! network, no modules.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde_json::Value;
use testbed::cross::Toolchain;
use testbed::image;
use testbed::machine::find_on_path;
use testbed::products::{DEV_SELECTION, cargo, strip_by, workspace};

use super::{conditions, libraries};
use crate::suite::LIBBPF;

/// The first program. It leaves the initial root, from which runc's `pivot_root(2)` is refused.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox mkdir -p /new /proc /sys
/bin/busybox mount -t tmpfs -o size=80% tmpfs /new
for entry in bin etc lib lib64 sbin tests usr; do /bin/busybox cp -a /$entry /new/; done
/bin/busybox mkdir -p /new/proc /new/sys /new/dev /new/run /new/tmp
exec /bin/busybox switch_root /new /sbin/begin
";
/// The second one, as far as it goes before the guest's condition is made, and after that. What it
/// prints is read by `report`.
const BEGIN: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/ RUST_BACKTRACE=0 EXIT_CONFORMANCE_SLOW=1
export EXIT_CONFORMANCE_PROGRAM=/tests/shapes EMBEDSHIM_TEST_BINARIES=/tests
export EMBEDSHIM_TEST_PATIENCE=180
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
# TOMOYO, on in Debian's 5.10, resolves the name /dev/fd/N of a program that runs from a descriptor, as runc does with itself.
ln -s /proc/self/fd /dev/fd
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t bpf bpf /sys/fs/bpf
ifconfig lo up
ulimit -n 65536
";
const GO_ON: &str = "
filter=$(sed -n 's/.*embedshim.filter=\\([^ ]*\\).*/\\1/p' /proc/cmdline)
echo \"=== kernel $(uname -r)\"
echo '=== begin probe'
/tests/embedshimd probe --json
echo \"=== end probe $?\"
for suite in conformance end_to_end; do
  case $suite in end_to_end) only=smoke:: ;; *) only=$filter ;; esac
  echo \"=== begin $suite\"
  /tests/$suite --color never $only
  status=$?
  echo \"=== end $suite $status\"
  case $status in 0) ;; *) dmesg | tail -n 60 ;; esac
done
case $(dmesg) in *WARNING:*/bpf/*) result=FAILED ;; *) result=ok ;; esac
echo \"test kernel::does_not_warn_of_our_program ... $result\"
echo '=== all done'
poweroff -f
";

/// Programs of Debian beside busybox, and where its packages have them. busybox's unshare has no
/// time namespaces.
const OF_DEBIAN: [(&str, &str); 3] = [
    ("runc", "usr/sbin/runc"),
    ("crun", "usr/bin/crun"),
    ("unshare", "usr/bin/unshare"),
];

/// Builds it and returns its path. With a toolchain it is one of that architecture.
pub(super) fn build(binaries: &Path, toolchain: Option<&Toolchain>) -> anyhow::Result<PathBuf> {
    let directory = directory(toolchain);
    let root = directory.join("root");
    let _ = fs::remove_dir_all(&root);
    for part in [
        "bin", "etc", "lib", "lib64", "sbin", "tests", "usr/bin", "usr/sbin",
    ] {
        fs::create_dir_all(root.join(part))?;
    }
    let busybox = of_debian("busybox", "bin/busybox", toolchain)?;
    fs::copy(busybox, root.join("bin/busybox")).context("busybox-static is needed")?;
    write_program(&root.join("init"), INIT)?;
    write_program(
        &root.join("sbin/begin"),
        &[BEGIN, conditions::MAKE, GO_ON].concat(),
    )?;
    let mut programs = test_programs(toolchain)?;
    for binary in ["embedshimd", "containerd-shim-embed-v1"] {
        programs.push((binary.into(), binaries.join(binary)));
    }
    let mut linked = Vec::new();
    let tool = toolchain.map_or_else(|| "strip".to_owned(), |other| other.tool("strip"));
    for (name, program) in programs {
        strip_by(&tool, &program, &root.join("tests").join(name))?;
        linked.push(program);
    }
    let compiler = toolchain.map_or(Path::new("cc"), Toolchain::c_compiler);
    image::compile_shapes(compiler, &root.join("tests/shapes"))?;
    for (name, path) in OF_DEBIAN {
        let program = of_debian(name, path, toolchain)?;
        fs::copy(&program, root.join("usr/bin").join(name))?;
        linked.push(program);
    }
    for library in libraries::of(&linked, toolchain)? {
        let path = &library.path;
        let target = root.join(path.strip_prefix("/").unwrap_or(path));
        fs::create_dir_all(target.parent().unwrap_or(&root))?;
        fs::copy(&library.file, target).with_context(|| library.file.display().to_string())?;
    }
    symlink("/proc/self/mounts", root.join("etc/mtab"))?;
    pack(&root, &directory.join("initramfs.cpio"))
}

/// Where it is made, and the consoles are written to.
fn directory(toolchain: Option<&Toolchain>) -> PathBuf {
    let target = workspace().join("target");
    match toolchain {
        None => target.join("matrix"),
        Some(other) => target.join(format!("matrix-{}", other.architecture().name())),
    }
}

/// A program of this machine, or of the other architecture's tree.
fn of_debian(name: &str, path: &str, toolchain: Option<&Toolchain>) -> anyhow::Result<PathBuf> {
    let program = match toolchain {
        None if name == "busybox" => Path::new("/").join(path),
        None => find_on_path(name).with_context(|| format!("{name} is needed"))?,
        Some(other) => other.sysroot().join(path),
    };
    fs::canonicalize(&program).with_context(|| program.display().to_string())
}

fn write_program(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text)?;
    Ok(fs::set_permissions(
        path,
        fs::Permissions::from_mode(0o755),
    )?)
}

/// The test programs, by the names of their suites.
fn test_programs(toolchain: Option<&Toolchain>) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let mut cargo = match toolchain {
        None => {
            let mut cargo = cargo();
            cargo.arg("test");
            cargo
        }
        Some(other) => other.cargo("test"),
    };
    cargo.args(["--quiet", "--no-run"]);
    cargo.args(DEV_SELECTION).args(["--features", LIBBPF]);
    cargo.args([
        "--test",
        "conformance",
        "--test",
        "end_to_end",
        "--message-format=json",
    ]);
    let mut child = cargo
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let output = child.stdout.take().context("no output of cargo")?;
    let mut programs = Vec::new();
    for line in BufReader::new(output).lines() {
        let Ok(message) = serde_json::from_str::<Value>(&line?) else {
            continue;
        };
        let name = message.pointer("/target/name").and_then(Value::as_str);
        let program = message.get("executable").and_then(Value::as_str);
        // With the tests of a package its programs are built, too.
        let is_test = message.pointer("/target/kind/0").and_then(Value::as_str) == Some("test");
        if let (true, Some(name), Some(program)) = (is_test, name, program) {
            programs.push((name.to_owned(), program.into()));
        }
    }
    ensure!(child.wait()?.success(), "the tests do not build");
    ensure!(programs.len() == 2, "two test programs, not {programs:?}");
    Ok(programs)
}

/// One archive of a directory, as the kernel unpacks it.
pub(crate) fn pack(root: &Path, target: &Path) -> anyhow::Result<PathBuf> {
    let script = "cd \"$1\" && find . | cpio --quiet --create --format=newc > \"$2\"";
    let status = Command::new("sh")
        .args(["-c", script, "sh"])
        .args([root, target])
        .status()?;
    ensure!(status.success(), "cpio: {status}");
    Ok(target.to_owned())
}

//! The test image: static busybox, and a small static program, as an OCI archive made on
//! the spot. No registry is ever asked.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::machine::run;
use crate::products::workspace;

/// What the image is called in containerd.
pub const NAME: &str = "docker.io/library/guest:latest";

const BUSYBOX: &str = "/bin/busybox";
/// This machine's C compiler.
const CC: &str = "cc";
const APPLETS: [&str; 24] = [
    "cat", "date", "dd", "echo", "env", "false", "grep", "head", "id", "kill", "ls", "mount", "ps",
    "pwd", "readlink", "seq", "sh", "sleep", "stty", "tail", "test", "true", "tty", "wc",
];

/// Makes the image below `directory` and returns the archive's path.
pub fn build(directory: &Path) -> anyhow::Result<PathBuf> {
    let rootfs = directory.join("rootfs");
    fill(&rootfs).with_context(|| format!("cannot fill {}", rootfs.display()))?;
    let oci = directory.join("oci");
    fs::create_dir_all(oci.join("blobs/sha256"))?;
    let layer = directory.join("layer.tar");
    run(Command::new("tar")
        .arg("-C")
        .arg(&rootfs)
        .arg("-cf")
        .arg(&layer)
        .arg("."))?;
    let layer = Blob::add(
        &oci,
        &fs::read(&layer)?,
        "application/vnd.oci.image.layer.v1.tar",
    )?;
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": { "Env": ["PATH=/bin"], "Cmd": ["guest", "until-term", "0"] },
        "rootfs": { "type": "layers", "diff_ids": [layer.digest] },
    });
    let config = Blob::add(
        &oci,
        config.to_string().as_bytes(),
        "application/vnd.oci.image.config.v1+json",
    )?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config.describe(),
        "layers": [layer.describe()],
    });
    let manifest = Blob::add(
        &oci,
        manifest.to_string().as_bytes(),
        "application/vnd.oci.image.manifest.v1+json",
    )?;
    let mut described = manifest.describe();
    if let Some(fields) = described.as_object_mut() {
        fields.insert(
            "annotations".into(),
            json!({ "io.containerd.image.name": NAME }),
        );
        fields.insert(
            "platform".into(),
            json!({ "architecture": architecture(), "os": "linux" }),
        );
    }
    fs::write(
        oci.join("index.json"),
        json!({ "schemaVersion": 2, "manifests": [described] }).to_string(),
    )?;
    fs::write(
        oci.join("oci-layout"),
        json!({ "imageLayoutVersion": "1.0.0" }).to_string(),
    )?;
    let archive = directory.join("image.tar");
    run(Command::new("tar")
        .arg("-C")
        .arg(&oci)
        .arg("-cf")
        .arg(&archive)
        .arg("."))?;
    Ok(archive)
}

fn fill(rootfs: &Path) -> anyhow::Result<()> {
    let bin = rootfs.join("bin");
    fs::create_dir_all(&bin)?;
    for directory in ["dev", "etc", "proc", "sys", "tmp"] {
        fs::create_dir_all(rootfs.join(directory))?;
    }
    fs::copy(BUSYBOX, bin.join("busybox")).with_context(|| format!("cannot copy {BUSYBOX}"))?;
    for applet in APPLETS {
        symlink("busybox", bin.join(applet))?;
    }
    compile(CC, "tests/guest/guest.c", &bin.join("guest"))
}

/// Compiles the program whose processes end in every way there is, for the conformance suite.
pub fn compile_shapes(compiler: &Path, program: &Path) -> anyhow::Result<()> {
    compile(compiler, "crates/exit-conformance/src/shapes.c", program)
}

/// Compiles the OCI runtime whose containers are one small process each, for tests that need
/// thousands.
pub fn compile_echo_runtime(program: &Path) -> anyhow::Result<()> {
    compile(CC, "tests/crowd/echo_runtime.c", program)
}

/// A static program, which runs in any image and guest.
fn compile(compiler: impl AsRef<OsStr>, source: &str, program: &Path) -> anyhow::Result<()> {
    let mut compiler = Command::new(compiler);
    compiler
        .args(["-O1", "-Wall", "-Werror", "-static", "-pthread", "-o"])
        .arg(program)
        .arg(workspace().join(source));
    run(&mut compiler)
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// One content-addressed file of the image.
struct Blob {
    digest: String,
    size: usize,
    media_type: &'static str,
}

impl Blob {
    fn add(oci: &Path, bytes: &[u8], media_type: &'static str) -> anyhow::Result<Self> {
        let blobs = oci.join("blobs/sha256");
        let unnamed = blobs.join("new");
        fs::write(&unnamed, bytes)?;
        let output = Command::new("sha256sum")
            .arg(&unnamed)
            .output()
            .context("cannot run sha256sum")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let Some(hash) = text
            .split_whitespace()
            .next()
            .filter(|hash| hash.len() == 64)
        else {
            bail!("sha256sum printed {text:?}");
        };
        fs::rename(&unnamed, blobs.join(hash))?;
        Ok(Self {
            digest: format!("sha256:{hash}"),
            size: bytes.len(),
            media_type,
        })
    }

    fn describe(&self) -> Value {
        json!({ "mediaType": self.media_type, "digest": self.digest, "size": self.size })
    }
}

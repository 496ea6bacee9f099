//! Compiles the counting program with clang, as monitor-bpf does its own.

use std::env;
use std::path::PathBuf;
use std::process::Command;

const PROGRAM: &str = "bpf/count.bpf.c";

fn main() {
    println!("cargo::rerun-if-changed=bpf");
    println!("cargo::rerun-if-env-changed=CLANG");
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".into());
    let object = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("count.bpf.o");
    let output = Command::new(&clang)
        .args([
            "-g", "-O2", "-Wall", "-Werror", "-target", "bpf", "-mcpu=v3", "-c", PROGRAM, "-o",
        ])
        .arg(&object)
        .output();
    let failure = match output {
        Ok(output) if output.status.success() => return,
        Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
        Err(error) => error.to_string(),
    };
    println!("cargo::error=cannot compile {PROGRAM} with {clang}; run: cargo xtask setup");
    for line in failure.lines().take(20) {
        println!("cargo::error={line}");
    }
}

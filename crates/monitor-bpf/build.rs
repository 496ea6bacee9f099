//! Compiles the BPF programs with clang. Nothing generated is kept in git: what runs is what is
//! read.

use std::env;
use std::path::PathBuf;
use std::process::Command;

const PROGRAMS: [&str; 2] = ["exit", "all"];
const HELP: &str =
    "install them, on Debian: apt-get install clang libbpf-dev (or: cargo xtask setup)";

fn main() {
    println!("cargo::rerun-if-changed=bpf");
    println!("cargo::rerun-if-env-changed=CLANG");
    for name in PROGRAMS {
        compile(name);
    }
}

fn compile(name: &str) {
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".into());
    let program = format!("bpf/{name}.bpf.c");
    let object = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let output = Command::new(&clang)
        // -mcpu=v2: nothing newer is needed, and 5.10 takes it whatever clang's default is.
        .args([
            "-g", "-O2", "-Wall", "-Werror", "-target", "bpf", "-mcpu=v2", "-c", &program, "-o",
        ])
        .arg(object.join(format!("{name}.bpf.o")))
        .output();
    let failure = match output {
        Ok(output) if output.status.success() => return,
        Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
        Err(error) => error.to_string(),
    };
    println!(
        "cargo::error=cannot compile {program} with {clang}, which needs clang 11 or newer and libbpf's headers; {HELP}"
    );
    for line in failure.lines().take(20) {
        println!("cargo::error={line}");
    }
}

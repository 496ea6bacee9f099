//! Compiles `shapes.c`, the program whose processes end in every way there is. Owns no other file.

use std::env;
use std::path::PathBuf;
use std::process::Command;

const SOURCE: &str = "src/shapes.c";

fn main() {
    println!("cargo::rerun-if-changed={SOURCE}");
    let compiler = compiler();
    let program = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("shapes");
    // Static: the processes of the suite start other programs by path in namespaces of their own.
    let output = Command::new(&compiler)
        .args(["-O1", "-Wall", "-static", "-pthread", "-o"])
        .arg(&program)
        .arg(SOURCE)
        .output();
    let failure = match output {
        Ok(output) if output.status.success() => return,
        Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
        Err(error) => error.to_string(),
    };
    println!(
        "cargo::error=cannot compile {SOURCE} with {compiler}: a C compiler and a static C library are needed (on Debian: apt-get install gcc libc6-dev)"
    );
    for line in failure.lines().take(20) {
        println!("cargo::error={line}");
    }
}

/// The compiler for the target, by the variables that crates with C code share.
fn compiler() -> String {
    let target = env::var("TARGET").unwrap_or_default().replace('-', "_");
    let names = [format!("CC_{target}"), "CC".to_owned()];
    for name in &names {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let mut set = names.iter().filter_map(|name| env::var(name).ok());
    set.next().unwrap_or_else(|| "cc".to_owned())
}

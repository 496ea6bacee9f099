//! The libraries that a guest's programs are linked to: of this machine, as its loader finds them,
//! or of another architecture, out of that one's tree.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use testbed::cross::Toolchain;

/// A library: its file here, and its path in the guest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Library {
    pub(super) file: PathBuf,
    pub(super) path: PathBuf,
}

/// Everything that the loader would load for these programs, and the loader.
pub(super) fn of(
    programs: &[PathBuf],
    toolchain: Option<&Toolchain>,
) -> anyhow::Result<BTreeSet<Library>> {
    let Some(toolchain) = toolchain else {
        return of_this_machine(programs);
    };
    let mut found = BTreeSet::new();
    let mut waiting = programs.to_vec();
    while let Some(file) = waiting.pop() {
        for name in needed(toolchain, &file)? {
            let library = find(toolchain, &name)
                .with_context(|| format!("{} needs {name}, which is missing", file.display()))?;
            if found.insert(library.clone()) {
                waiting.push(library.file);
            }
        }
    }
    Ok(found)
}

fn of_this_machine(programs: &[PathBuf]) -> anyhow::Result<BTreeSet<Library>> {
    let mut found = BTreeSet::new();
    for program in programs {
        let output = Command::new("ldd")
            .arg(program)
            .output()
            .context("cannot run ldd")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let paths = text.split_whitespace().filter(|word| word.starts_with('/'));
        found.extend(paths.map(|path| Library {
            file: path.into(),
            path: path.into(),
        }));
    }
    Ok(found)
}

/// The names of what a program or library is linked to.
fn needed(toolchain: &Toolchain, file: &Path) -> anyhow::Result<Vec<String>> {
    let tool = toolchain.tool("objdump");
    let output = Command::new(&tool).arg("-p").arg(file).output();
    let output = output.with_context(|| format!("cannot run {tool}"))?;
    ensure!(
        output.status.success(),
        "{tool} {}: {}",
        file.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(needed_of(&String::from_utf8_lossy(&output.stdout)))
}

fn needed_of(headers: &str) -> Vec<String> {
    let lines = headers.lines();
    let names = lines.filter_map(|line| line.trim().strip_prefix("NEEDED").map(str::trim));
    names.map(str::to_owned).collect()
}

/// Where the loader of the architecture looks. The loader itself is where programs name it.
fn find(toolchain: &Toolchain, name: &str) -> Option<Library> {
    let tuple = toolchain.architecture().tuple();
    let directories = [
        "lib".to_owned(),
        format!("lib/{tuple}"),
        format!("usr/lib/{tuple}"),
    ];
    directories.iter().find_map(|directory| {
        let path = Path::new(directory).join(name);
        let file = toolchain.sysroot().join(&path);
        file.is_file().then(|| Library {
            file,
            path: Path::new("/").join(path),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_library_needs_is_read_off_its_headers() {
        let headers = "Dynamic Section:\n  NEEDED               ld-linux-aarch64.so.1\n  \
                       NEEDED               libc.so.6\n  SONAME               libm.so.6\n";
        assert_eq!(needed_of(headers), ["ld-linux-aarch64.so.1", "libc.so.6"]);
    }

    #[test]
    fn the_loader_is_among_the_libraries_of_this_machine() {
        let libraries = of(&["/bin/sh".into()], None).unwrap();
        let mut files = libraries.iter().map(|library| library.file.display());
        assert!(files.any(|file| file.to_string().contains("/ld-linux")));
    }
}

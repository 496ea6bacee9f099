//! The paths that comments and documents name exist in the repository. Owns what counts as such a
//! path; looks at no code.

use std::fs;
use std::path::Path;

use anyhow::Context;

/// The directories at the root whose files are named by their paths.
const ROOTS: [&str; 6] = [
    "crates/",
    "docs/",
    "fuzz/",
    "packaging/",
    "tests/",
    "xtask/",
];
/// Comments in these say where they are; so do documents.
const COMMENTED: [&str; 2] = ["rs", "c"];

/// Lists each path that is named and does not exist.
pub(super) fn check(workspace: &Path, violations: &mut Vec<String>) -> anyhow::Result<()> {
    let mut files = Vec::new();
    collect(workspace, workspace, &mut files)?;
    for file in &files {
        let extension = file.rsplit('.').next().unwrap_or_default();
        let is_document = extension == "md";
        if !is_document && !COMMENTED.contains(&extension) {
            continue;
        }
        let text = fs::read_to_string(workspace.join(file)).with_context(|| file.clone())?;
        let lines = text
            .lines()
            .filter(|line| is_document || is_comment(line.trim_start()));
        for missing in lines.flat_map(paths).filter(|path| !exists(&files, path)) {
            violations.push(format!("{file}: there is no {missing}"));
        }
    }
    Ok(())
}

/// The files below a directory as paths from the root, without what is built or hidden.
fn collect(root: &Path, directory: &Path, files: &mut Vec<String>) -> anyhow::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                collect(root, &path, files)?;
            }
        } else if let Ok(path) = path.strip_prefix(root) {
            files.push(path.display().to_string());
        }
    }
    Ok(())
}

fn is_comment(line: &str) -> bool {
    line.starts_with("//") || line.starts_with("* ") || line.starts_with("/*")
}

/// The words of a line that are paths from the root, or names of Rust files.
fn paths(line: &str) -> impl Iterator<Item = &str> {
    line.split(|letter: char| !(letter.is_ascii_alphanumeric() || "_-./".contains(letter)))
        .map(|word| word.trim_matches('.').trim_end_matches('/'))
        .filter(|word| {
            let stem = word.strip_suffix(".rs");
            // Not a host's name, as in `https://docs.rs`.
            let is_rust =
                stem.is_some_and(|stem| !["", "docs"].contains(&stem) && !stem.contains("//"));
            // A placeholder, as in `crates/monitor-NAME`.
            let is_pattern = word.contains("NAME");
            !is_pattern && (is_rust || ROOTS.iter().any(|root| word.starts_with(root)))
        })
}

/// Whether this is a file, a directory, a module or a test, or the end of a file's path.
fn exists(files: &[String], path: &str) -> bool {
    let (directory, module, end) = (
        format!("{path}/"),
        format!("{path}.rs"),
        format!("/{}", path.trim_start_matches('/')),
    );
    files.iter().any(|file| {
        file == path || *file == module || file.starts_with(&directory) || file.ends_with(&end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_and_missing_is_found() {
        let line = "// See docs/x.md, `tests/end_to_end`, (crates/a/src/b.rs) and c.rs; not src/.";
        let named: Vec<&str> = paths(line).collect();
        assert_eq!(
            named,
            ["docs/x.md", "tests/end_to_end", "crates/a/src/b.rs", "c.rs"]
        );
        assert_eq!(
            paths("`crates/monitor-NAME`, linux/loop.h, docs.rs").count(),
            0
        );
        let files = ["tests/end_to_end/main.rs", "crates/a/src/c.rs"].map(str::to_owned);
        assert!(exists(&files, "tests/end_to_end"));
        assert!(exists(&files, "tests/end_to_end/main"));
        assert!(exists(&files, "c.rs"));
        assert!(!exists(&files, "docs/x.md"));
        assert!(!exists(&files, "b.rs"));
    }
}

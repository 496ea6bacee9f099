//! `cargo xtask tidy`: what lints can't check. Every rule is a function that lists its violations.

mod imports;
mod references;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::Value;
use testbed::products::{cargo, workspace};

use crate::api;
use crate::package::is_published;

/// Which crates of the workspace each may depend on (ARCHITECTURE.md, "The crates").
const ARROWS: [(&str, &[&str]); 13] = [
    ("exit-monitor", &[]),
    ("exit-conformance", &["exit-monitor"]),
    ("embedshim-core", &["exit-monitor"]),
    ("monitor-bpf", &["exit-monitor"]),
    ("monitor-pidfd", &["exit-monitor"]),
    ("monitor-ptrace", &["exit-monitor"]),
    ("sandbox-api", &["embedshim-core"]),
    ("shim-api", &["embedshim-core"]),
    (
        "embedshimd",
        &[
            "embedshim-core",
            "monitor-bpf",
            "monitor-pidfd",
            "monitor-ptrace",
            "sandbox-api",
            "shim-api",
        ],
    ),
    ("testbed", &[]),
    ("embedshim-bench", &["testbed"]),
    ("xtask", &["testbed"]),
    (
        "embedshim-tests",
        &[
            "embedshim-core",
            "exit-conformance",
            "exit-monitor",
            "monitor-bpf",
            "monitor-pidfd",
            "monitor-ptrace",
            "shim-api",
            "testbed",
        ],
    ),
];
/// What the manifest of each crate that is published must have.
const PACKAGE_FIELDS: [&str; 6] = [
    "description",
    "license",
    "repository",
    "readme",
    "keywords",
    "categories",
];
/// What every checkout must have.
const DOCUMENTS: [&str; 18] = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "LICENSE",
    "deny.toml",
    "docs/benchmarks.md",
    "docs/contract.md",
    "docs/decisions.md",
    "docs/exit-status.md",
    "docs/library.md",
    "docs/operating.md",
    "docs/security.md",
    "docs/sandbox.md",
    "docs/shim-contract.md",
    "docs/survival.md",
    "docs/testing.md",
];
/// Numbers the invariants.
const ARCHITECTURE: &str = "ARCHITECTURE.md";
/// Names tests, which must exist.
const CONTRACT: &str = "docs/contract.md";
/// Names that say nothing.
const EMPTY_NAMES: [&str; 6] = ["utils", "util", "common", "helpers", "misc", "manager"];
/// How wide a comment may be; tables may be wider.
const MAX_COLUMNS: usize = 100;
/// Beyond this, a file has more than one subject.
const MAX_LINES: usize = 500;

/// Checks all rules.
pub(crate) fn run() -> anyhow::Result<()> {
    let mut violations = Vec::new();
    dependencies(&mut violations)?;
    for document in DOCUMENTS {
        if !workspace().join(document).is_file() {
            violations.push(format!("{document} is missing"));
        }
    }
    justified_dependencies(&mut violations)?;
    imports::check(&workspace().join("crates"), &mut violations)?;
    references::check(&workspace(), &mut violations)?;
    let mut all = String::new();
    for file in sources(&workspace())? {
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let shown = file.strip_prefix(workspace()).unwrap_or(&file).to_owned();
        source(&shown, &text, &mut violations);
        all.push_str(&text);
    }
    let architecture = fs::read_to_string(workspace().join(ARCHITECTURE))?;
    invariants(&architecture, &all, &mut violations);
    let contract = fs::read_to_string(workspace().join(CONTRACT))?;
    for test in promised_tests(&contract) {
        if !all.contains(&format!("fn {test}(")) {
            violations.push(format!("{CONTRACT}: there is no test {test}"));
        }
    }
    api::check(&mut violations)?;
    if violations.is_empty() {
        println!("tidy");
        return Ok(());
    }
    for violation in &violations {
        eprintln!("{violation}");
    }
    bail!("{} violations", violations.len())
}

/// The arrows between the crates point where ARCHITECTURE.md says; what is published says what it
/// is.
fn dependencies(violations: &mut Vec<String>) -> anyhow::Result<()> {
    let output = cargo()
        .args(["metadata", "--format-version=1", "--no-deps"])
        .output()
        .context("cannot run cargo metadata")?;
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    for package in list(&metadata, "packages") {
        let name = name_of(package);
        let Some((_, allowed)) = ARROWS.iter().find(|(known, _)| *known == name) else {
            violations.push(format!(
                "{name}: this crate is not in xtask's list of arrows"
            ));
            continue;
        };
        let is_library = is_published(package);
        for field in PACKAGE_FIELDS.iter().filter(|_| is_library) {
            let value = package.get(*field).unwrap_or(&Value::Null);
            if value.is_null() || value.as_array().is_some_and(Vec::is_empty) {
                violations.push(format!("{name}: it is published, and has no {field}"));
            }
        }
        for dependency in list(package, "dependencies") {
            // Tests may use what the product must not.
            if dependency.get("kind").and_then(Value::as_str) == Some("dev") {
                continue;
            }
            let dependency = name_of(dependency);
            let is_ours = ARROWS.iter().any(|(known, _)| *known == dependency);
            if is_ours && !allowed.contains(&dependency) {
                violations.push(format!("{name} must not depend on {dependency}"));
            }
        }
    }
    Ok(())
}

fn list<'a>(value: &'a Value, field: &str) -> &'a [Value] {
    value
        .get(field)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

fn name_of(value: &Value) -> &str {
    value
        .get("name")
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// Each dependency has its reason in the line above it.
fn justified_dependencies(violations: &mut Vec<String>) -> anyhow::Result<()> {
    let manifest = fs::read_to_string(workspace().join("Cargo.toml"))?;
    let section = manifest
        .split("[workspace.dependencies]")
        .nth(1)
        .unwrap_or_default();
    let members = members_manifests()?;
    let mut before = "";
    for line in section.lines().take_while(|line| !line.starts_with('[')) {
        if let Some((name, _)) = line.split_once(" = ")
            && !line.starts_with('#')
            && !members.lines().any(|used| is_use_of(used, name))
        {
            violations.push(format!("Cargo.toml: no member uses {name}"));
        }
        let is_foreign = line.contains('=') && !line.contains("path = ");
        if is_foreign && !before.starts_with('#') {
            violations.push(format!("Cargo.toml: no reason above: {line}"));
        }
        before = line;
    }
    Ok(())
}

/// Each invariant is cited by its number where it is enforced, and each number that is cited is
/// that of an invariant.
fn invariants(architecture: &str, sources: &str, violations: &mut Vec<String>) {
    let table = architecture.split("## Invariants").nth(1);
    let table = table.unwrap_or_default().split("\n## ").next();
    let numbered: BTreeSet<u32> = table
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split(" | ").next()?.parse().ok())
        .collect();
    let cited: BTreeSet<u32> = sources
        .split("invariant")
        .skip(1)
        .flat_map(leading_numbers)
        .collect();
    for number in numbered.difference(&cited) {
        violations.push(format!("{ARCHITECTURE}: no code cites invariant {number}"));
    }
    for number in cited.difference(&numbered) {
        violations.push(format!(
            "{ARCHITECTURE}: no invariant has the number {number}"
        ));
    }
}

/// The numbers in what follows the word: of one, or of several in an enumeration.
fn leading_numbers(text: &str) -> Vec<u32> {
    let mut numbers = Vec::new();
    let mut next = text.strip_prefix('s').unwrap_or(text).strip_prefix(' ');
    while let Some(rest) = next {
        let end = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (digits, after) = rest.split_at(end);
        let Ok(number) = digits.parse() else { break };
        numbers.push(number);
        next = after
            .strip_prefix(", ")
            .or_else(|| after.strip_prefix(" and "));
    }
    numbers
}

/// What all members depend on.
fn members_manifests() -> anyhow::Result<String> {
    let mut all = String::new();
    for directory in ["crates", "."] {
        for entry in fs::read_dir(workspace().join(directory))? {
            // What is not there is no member.
            all += &fs::read_to_string(entry?.path().join("Cargo.toml")).unwrap_or_default();
        }
    }
    Ok(all)
}

/// Whether a line of a member's manifest takes this dependency from the workspace, or by its path.
fn is_use_of(line: &str, name: &str) -> bool {
    line.strip_prefix(name)
        .is_some_and(|rest| rest.starts_with(".workspace") || rest.trim_start().starts_with("= {"))
}

/// The tests that the regression list names, in backquotes in the last column.
fn promised_tests(contract: &str) -> impl Iterator<Item = &str> {
    let list = contract.split("## The regression list").nth(1);
    let cells = list
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split(" | ").nth(2));
    cells.flat_map(|cell| cell.split('`').skip(1).step_by(2))
}

fn sources(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                found.extend(sources(&path)?);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    Ok(found)
}

fn source(file: &Path, text: &str, violations: &mut Vec<String>) {
    let mut complain = |what: &str| violations.push(format!("{}: {what}", file.display()));
    if !text.starts_with("//! ") {
        complain("no module header: say in a few lines what it owns");
    }
    if let Some(line) = text.lines().find(|line| is_wide_comment(line)) {
        complain(&format!(
            "a comment of more than {MAX_COLUMNS} columns: {}",
            line.trim()
        ));
    }
    let lines = text.lines().count();
    if lines > MAX_LINES {
        complain(&format!("{lines} lines, more than {MAX_LINES}"));
    }
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    if EMPTY_NAMES
        .iter()
        .any(|name| stem.split('_').any(|word| word == *name))
    {
        complain("a module is a noun of the domain");
    }
    if stem != "sys" && text.lines().any(has_unsafe) {
        // The reason of each block is clippy's to demand (invariant 19).
        complain("unsafe code outside of a `sys` module");
    }
}

/// Whether a line is a comment that is too wide, and neither a row of a table nor a link.
fn is_wide_comment(line: &str) -> bool {
    let text = line.trim_start();
    let is_comment = text.starts_with("//");
    let text = text.trim_start_matches(['/', '!']).trim_start();
    let may_be_wide = text.starts_with('|') || text.contains("://");
    is_comment && !may_be_wide && line.chars().count() > MAX_COLUMNS
}

/// Whether a line has unsafe code, not just the word in a comment, a string or a lint's name.
fn has_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let word = concat!("un", "safe");
    [" {", " fn ", " impl ", " extern "]
        .iter()
        .any(|next| code.contains(&format!("{word}{next}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promised_tests_are_those_of_the_last_column() {
        let text =
            "`no` |\n## The regression list\n| 1 | `x` | `a`, `b` (c) |\n| 2 | y | a Go matter |\n";
        assert_eq!(promised_tests(text).collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn invariants_are_cited_and_exist() {
        assert_eq!(leading_numbers(" 3)."), [3]);
        assert_eq!(leading_numbers("s 3, 5 and 16: their order"), [3, 5, 16]);
        assert_eq!(leading_numbers("s of exits"), [0; 0]);
        let document =
            "| 1 | no |\n## Invariants\n| 2 | a | b |\n| 3 | c | d |\n## Next\n| 4 | no |";
        let word = concat!("inva", "riant");
        let mut violations = Vec::new();
        invariants(document, &format!("({word}s 2 and 3)"), &mut violations);
        assert_eq!(violations, [""; 0]);
        invariants(document, &format!("({word} 2; {word} 9)"), &mut violations);
        assert_eq!(violations.len(), 2);
    }

    #[test]
    fn violations_are_found() {
        let complaints = |file: &str, text: &str| {
            let mut violations = Vec::new();
            source(Path::new(file), text, &mut violations);
            violations.len()
        };
        let code = concat!("//! A module.\nun", "safe { work() }\n");
        assert_eq!(complaints("src/work.rs", "//! A module.\n"), 0);
        assert_eq!(complaints("src/work.rs", "fn work() {}\n"), 1);
        assert_eq!(complaints("src/file_utils.rs", "//! A module.\n"), 1);
        assert_eq!(complaints("src/work.rs", code), 1);
        assert_eq!(complaints("src/sys.rs", code), 0);
        let wide = format!("//! A module.\n    // {}\n", "word ".repeat(20));
        assert_eq!(complaints("src/work.rs", &wide), 1);
        assert_eq!(complaints("src/work.rs", &wide.replace("// ", "//! | ")), 0);
        assert_eq!(
            complaints("src/work.rs", &"//! Long.\n".repeat(MAX_LINES + 1)),
            1
        );
    }
}

//! What the shipped programs are made of: a bill of materials in `CycloneDX` 1.5 (JSON). Owns
//! which crates are in it; each fact of one is cargo's. The same bytes for the same `Cargo.lock`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use testbed::products::{cargo, workspace};

/// The package with both programs.
const PRODUCT: &str = "embedshimd";

/// A name and a version: what tells a crate from all others here.
type Id = (String, String);

/// The bill of what is built for this architecture.
pub(crate) fn bill(architecture: &str) -> anyhow::Result<String> {
    let target = format!("{architecture}-unknown-linux-gnu");
    let linked = packages("normal", &target)?;
    let all = packages("normal,build", &target)?;
    let metadata = metadata(&target)?;
    let checksums = checksums()?;
    let packages = by_id(&metadata)?;
    let mut components = Vec::new();
    let mut product = None;
    for id in &all {
        let package = packages
            .get(id)
            .with_context(|| format!("cargo metadata has no {} {}", id.0, id.1))?;
        if id.0 == PRODUCT {
            product = Some(component("application", id, package, checksums.get(id)));
            continue;
        }
        let mut component = component("library", id, package, checksums.get(id));
        // What only builds the programs is not in them.
        let scope = if linked.contains(id) {
            "required"
        } else {
            "excluded"
        };
        put(&mut component, "scope", scope.into());
        components.push(component);
    }
    let product = product.with_context(|| format!("cargo tree has no {PRODUCT}"))?;
    let bill = json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": { "component": product },
        "components": components,
        "dependencies": dependencies(&metadata, &all)?,
    });
    Ok(serde_json::to_string_pretty(&bill)? + "\n")
}

/// The packages that the product is made of along these kinds of dependencies, with its own
/// features alone.
fn packages(edges: &str, target: &str) -> anyhow::Result<BTreeSet<Id>> {
    let mut tree = cargo();
    tree.args(["tree", "--locked", "--package", PRODUCT, "--edges", edges]);
    tree.args(["--prefix", "none", "--format", "{p}", "--target", target]);
    let output = tree.output().context("cannot run cargo tree")?;
    ensure!(
        output.status.success(),
        "cargo tree failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout)?;
    let ids = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let name = words.next()?;
        let version = words.next()?.strip_prefix('v')?;
        Some((name.to_owned(), version.to_owned()))
    });
    Ok(ids.collect())
}

fn metadata(target: &str) -> anyhow::Result<Value> {
    let mut metadata = cargo();
    metadata.args(["metadata", "--locked", "--format-version=1"]);
    // What other targets need is perhaps not on this machine.
    metadata.args(["--filter-platform", target]);
    let output = metadata.output().context("cannot run cargo metadata")?;
    serde_json::from_slice(&output.stdout).context("cargo metadata")
}

fn list<'a>(value: &'a Value, pointer: &str) -> anyhow::Result<&'a Vec<Value>> {
    let list = value.pointer(pointer).and_then(Value::as_array);
    list.with_context(|| format!("cargo metadata has no {pointer}"))
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key)?.as_str()
}

fn id_of(package: &Value) -> Option<Id> {
    let (name, version) = (text(package, "name")?, text(package, "version")?);
    Some((name.to_owned(), version.to_owned()))
}

fn by_id(metadata: &Value) -> anyhow::Result<BTreeMap<Id, &Value>> {
    let packages = list(metadata, "/packages")?.iter();
    Ok(packages
        .filter_map(|package| Some((id_of(package)?, package)))
        .collect())
}

/// The SHA-256 of each crate of a registry.
fn checksums() -> anyhow::Result<BTreeMap<Id, String>> {
    let lock = fs::read_to_string(workspace().join("Cargo.lock"))?;
    let lock: toml::Table = lock.parse().context("Cargo.lock")?;
    let packages = lock.get("package").and_then(toml::Value::as_array);
    let packages = packages.context("Cargo.lock has no packages")?;
    let checksums = packages.iter().filter_map(|package| {
        let word = |key: &str| Some(package.get(key)?.as_str()?.to_owned());
        Some(((word("name")?, word("version")?), word("checksum")?))
    });
    Ok(checksums.collect())
}

/// The name of a crate within the bill.
fn reference((name, version): &Id) -> String {
    format!("pkg:cargo/{name}@{version}")
}

fn component(kind: &str, id: &Id, package: &Value, checksum: Option<&String>) -> Value {
    let mut component = json!({
        "type": kind,
        "bom-ref": reference(id),
        "name": id.0,
        "version": id.1,
    });
    if let Some(license) = text(package, "license") {
        // As it was written before there was a syntax for it.
        let expression = license.replace('/', " OR ");
        put(
            &mut component,
            "licenses",
            json!([{ "expression": expression }]),
        );
    }
    if let Some(url) = text(package, "repository") {
        let reference = json!([{ "type": "vcs", "url": url }]);
        put(&mut component, "externalReferences", reference);
    }
    // Crates of this workspace are in no registry.
    if let Some(checksum) = checksum {
        put(&mut component, "purl", reference(id).into());
        let hash = json!([{ "alg": "SHA-256", "content": checksum }]);
        put(&mut component, "hashes", hash);
    }
    component
}

fn put(component: &mut Value, key: &str, value: Value) {
    if let Some(fields) = component.as_object_mut() {
        fields.insert(key.to_owned(), value);
    }
}

/// Which of these needs which, but for what their tests need.
fn dependencies(metadata: &Value, all: &BTreeSet<Id>) -> anyhow::Result<Vec<Value>> {
    let packages = list(metadata, "/packages")?.iter();
    let names: BTreeMap<&str, Id> = packages
        .filter_map(|package| Some((text(package, "id")?, id_of(package)?)))
        .collect();
    let mut edges = BTreeMap::new();
    for node in list(metadata, "/resolve/nodes")? {
        let id = text(node, "id").and_then(|id| names.get(id));
        let Some(id) = id.filter(|id| all.contains(*id)) else {
            continue;
        };
        let needed = list(node, "/deps")?.iter().filter(|dep| is_shipped(dep));
        let needed = needed.filter_map(|dep| names.get(text(dep, "pkg")?));
        let needed = needed.filter(|id| all.contains(*id)).map(reference);
        edges.insert(reference(id), needed.collect::<BTreeSet<_>>());
    }
    let lines = edges
        .into_iter()
        .map(|(of, needed)| json!({ "ref": of, "dependsOn": needed }));
    Ok(lines.collect())
}

/// Whether a dependency is another than one of tests.
fn is_shipped(dependency: &Value) -> bool {
    let kinds = dependency.get("dep_kinds").and_then(Value::as_array);
    kinds.is_some_and(|kinds| kinds.iter().any(|kind| text(kind, "kind") != Some("dev")))
}

#[cfg(test)]
mod tests {
    use testbed::architecture::Architecture;

    use super::*;

    #[test]
    fn the_bill_names_each_crate_once_and_nothing_that_is_only_tested_with() {
        let bill: Value = serde_json::from_str(&bill(std::env::consts::ARCH).unwrap()).unwrap();
        let components = list(&bill, "/components").unwrap();
        let scope_of = |name: &str| {
            let component = components
                .iter()
                .find(|one| text(one, "name") == Some(name));
            component.and_then(|one| text(one, "scope"))
        };
        assert_eq!(scope_of("tokio"), Some("required"));
        assert_eq!(scope_of("embedshim-core"), Some("required"));
        assert_eq!(scope_of("protobuf-codegen"), Some("excluded"));
        for absent in ["insta", "plotters", "tonic", "libbpf-rs", "embedshim-tests"] {
            assert_eq!(scope_of(absent), None, "{absent}");
        }
        let mut references: Vec<&str> = components
            .iter()
            .filter_map(|one| text(one, "bom-ref"))
            .collect();
        references.extend(
            bill.pointer("/metadata/component/bom-ref")
                .and_then(Value::as_str),
        );
        let named: BTreeSet<&str> = references.iter().copied().collect();
        assert_eq!(named.len(), references.len(), "{references:?}");
        // Each has a licence, and each of a registry a checksum.
        for component in components {
            assert!(component.get("licenses").is_some(), "{component}");
            let is_own = text(component, "version") == Some(env!("CARGO_PKG_VERSION"));
            assert!(is_own || component.get("hashes").is_some(), "{component}");
        }
        let edges = list(&bill, "/dependencies").unwrap();
        assert_eq!(edges.len(), references.len());
        for edge in edges {
            let needed = list(edge, "/dependsOn").unwrap().iter();
            let ends = needed.filter_map(Value::as_str).chain(text(edge, "ref"));
            for end in ends {
                assert!(named.contains(end), "{end}");
            }
        }
    }

    #[test]
    fn the_same_sources_have_the_same_bill_on_each_architecture() {
        let [first, second] = Architecture::ALL.map(|it| bill(it.name()).unwrap());
        assert_eq!(first, second);
        assert_eq!(first, bill(Architecture::X86_64.name()).unwrap());
    }
}

//! Which file of a crate imports which. Owns the rule that no files import each other in a circle,
//! and that the folders of the core's tasks import in one direction only.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use syn::visit::{self, Visit};

/// Within `embedshim-core/src/task`, from the top down: a file imports only what is in its own row
/// or below.
const FLOORS: [&[&str]; 6] = [
    &["task/node"],
    &["task/ops", "task/recovery", "task/exits"],
    &[
        "task/launch",
        "task/teardown",
        "task/unreported",
        "task/exec_files",
    ],
    &["task/engine"],
    &["task/registry"],
    &[
        "task/task",
        "task/process",
        "task/lifecycle",
        "task/exit_order",
    ],
];

type Module = Vec<String>;

/// The files of one crate, and what each takes from others.
struct House {
    /// Where each module is.
    files: BTreeMap<Module, PathBuf>,
    sources: BTreeMap<Module, Source>,
}

#[derive(Default)]
struct Source {
    /// Paths that the file uses, from the crate's root.
    uses: Vec<Module>,
    /// Names that it hands on, and what they stand for.
    exports: BTreeMap<String, Module>,
    /// Modules all of whose names it hands on.
    globs: Vec<Module>,
}

/// Complains about circles and about arrows that run up.
pub(super) fn check(crates: &Path, violations: &mut Vec<String>) -> anyhow::Result<()> {
    for entry in fs::read_dir(crates)? {
        let root = entry?.path().join("src");
        if !root.is_dir() {
            continue;
        }
        let house = House::read(&root)?;
        let arrows = house.arrows();
        for circle in circles(&arrows) {
            let ties = circle.iter().flat_map(|from| {
                let to = arrows.get(*from).into_iter().flatten();
                to.filter(|to| circle.contains(to))
                    .map(move |to| format!("{} -> {}", from.display(), to.display()))
            });
            violations.push(format!(
                "{}: these files import each other: {}",
                root.display(),
                ties.collect::<Vec<_>>().join(", ")
            ));
        }
        if root.ends_with("embedshim-core/src") {
            arrows_up(&arrows, violations);
        }
    }
    Ok(())
}

fn arrows_up(arrows: &BTreeMap<PathBuf, BTreeSet<PathBuf>>, violations: &mut Vec<String>) {
    let floor = |file: &Path| {
        let file = file.with_extension("");
        FLOORS
            .iter()
            .position(|rooms| rooms.iter().any(|room| file.starts_with(room)))
    };
    for (from, all) in arrows {
        for to in all {
            if let (Some(above), Some(below)) = (floor(from), floor(to))
                && above > below
            {
                violations.push(format!(
                    "{} imports {}, which is above it",
                    from.display(),
                    to.display()
                ));
            }
        }
    }
}

impl House {
    fn read(root: &Path) -> anyhow::Result<Self> {
        let mut house = Self {
            files: BTreeMap::new(),
            sources: BTreeMap::new(),
        };
        house.enter(root, root)?;
        for (module, file) in &house.files {
            let text = fs::read_to_string(root.join(file))?;
            let parsed = syn::parse_file(&text).with_context(|| file.display().to_string())?;
            let mut reader = Reader {
                module,
                files: &house.files,
                found: Source::default(),
            };
            reader.visit_file(&parsed);
            house.sources.insert(module.clone(), reader.found);
        }
        Ok(house)
    }

    fn enter(&mut self, root: &Path, directory: &Path) -> anyhow::Result<()> {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            let relative = path.strip_prefix(root)?.to_owned();
            if path.is_dir() {
                if relative != Path::new("bin") {
                    self.enter(root, &path)?;
                }
            } else if relative
                .extension()
                .is_some_and(|extension| extension == "rs")
            {
                let mut module: Module = relative
                    .with_extension("")
                    .iter()
                    .map(|part| part.to_string_lossy().into_owned())
                    .collect();
                let last = module.last().map(String::as_str);
                let is_root = module.len() == 1 && matches!(last, Some("lib" | "main"));
                if is_root || last == Some("mod") {
                    module.pop();
                }
                self.files.insert(module, relative);
            }
        }
        Ok(())
    }

    /// Each file and the files that it imports.
    fn arrows(&self) -> BTreeMap<PathBuf, BTreeSet<PathBuf>> {
        let mut arrows = BTreeMap::new();
        for (module, source) in &self.sources {
            let Some(own) = self.files.get(module) else {
                continue;
            };
            let to: BTreeSet<PathBuf> = source
                .uses
                .iter()
                .filter_map(|path| self.home(path, 0))
                .filter_map(|home| self.files.get(&home).cloned())
                .filter(|file| file != own)
                .collect();
            arrows.insert(own.clone(), to);
        }
        arrows
    }

    /// The module in which a path's name is defined, through all files that hand it on.
    fn home(&self, path: &[String], depth: usize) -> Option<Module> {
        const DEEPEST: usize = 8;
        let prefixes = (0..=path.len())
            .rev()
            .filter_map(|length| path.get(..length));
        let module = prefixes
            .into_iter()
            .find(|it| self.files.contains_key(*it))?;
        let (module, length) = (module.to_vec(), module.len());
        let (Some(name), true) = (path.get(length), depth < DEEPEST) else {
            return Some(module);
        };
        let source = self.sources.get(&module)?;
        if let Some(target) = source.exports.get(name) {
            return self.home(target, depth + 1).or(Some(module));
        }
        for glob in &source.globs {
            let mut through = glob.clone();
            through.push(name.clone());
            if let Some(home) = self.home(&through, depth + 1)
                && home != module
                && self
                    .sources
                    .get(&home)
                    .is_some_and(|it| it.exports.contains_key(name))
            {
                return Some(home);
            }
        }
        Some(module)
    }
}

/// Collects what one file uses.
struct Reader<'a> {
    module: &'a Module,
    files: &'a BTreeMap<Module, PathBuf>,
    found: Source,
}

impl Reader<'_> {
    /// The path from the crate's root, of one that stays in the crate.
    fn absolute(&self, path: &[String]) -> Option<Module> {
        let mut base = self.module.clone();
        let (first, mut rest) = path.split_first()?;
        match first.as_str() {
            "crate" => base.clear(),
            "self" => {}
            "super" => {
                base.pop()?;
                while let Some(("super", after)) = rest
                    .split_first()
                    .map(|(next, after)| (next.as_str(), after))
                {
                    base.pop()?;
                    rest = after;
                }
            }
            child => {
                base.push(child.to_owned());
                self.files.get(&base)?;
            }
        }
        base.extend_from_slice(rest);
        Some(base)
    }

    fn tree(&mut self, tree: &syn::UseTree, before: &mut Module, is_handed_on: bool) {
        match tree {
            syn::UseTree::Path(path) => {
                before.push(path.ident.to_string());
                self.tree(&path.tree, before, is_handed_on);
                before.pop();
            }
            syn::UseTree::Group(group) => {
                for item in &group.items {
                    self.tree(item, before, is_handed_on);
                }
            }
            syn::UseTree::Glob(_) => {
                if let Some(absolute) = self.absolute(before) {
                    if is_handed_on {
                        self.found.globs.push(absolute);
                    } else {
                        self.found.uses.push(absolute);
                    }
                }
            }
            syn::UseTree::Name(name) => self.name(&name.ident, &name.ident, before, is_handed_on),
            syn::UseTree::Rename(name) => {
                self.name(&name.ident, &name.rename, before, is_handed_on);
            }
        }
    }

    fn name(&mut self, name: &syn::Ident, shown: &syn::Ident, before: &Module, is_handed_on: bool) {
        let mut path = before.clone();
        if name != "self" {
            path.push(name.to_string());
        }
        let Some(absolute) = self.absolute(&path) else {
            return;
        };
        if is_handed_on {
            self.found.exports.insert(shown.to_string(), absolute);
        } else {
            self.found.uses.push(absolute);
        }
    }
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        // Tests in the file see all of it, and so does what they import.
        if item.content.is_none() || item.ident != "tests" {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        let is_handed_on = !matches!(item.vis, syn::Visibility::Inherited);
        self.tree(&item.tree, &mut Vec::new(), is_handed_on);
    }

    // `pub(in crate::server)` takes nothing from there.
    fn visit_vis_restricted(&mut self, _: &'ast syn::VisRestricted) {}

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.segments.len() > 1 {
            let parts: Module = path
                .segments
                .iter()
                .map(|part| part.ident.to_string())
                .collect();
            if let Some(absolute) = self.absolute(&parts) {
                self.found.uses.push(absolute);
            }
        }
        visit::visit_path(self, path);
    }
}

/// Sets of files each of which reaches all others of its set.
fn circles(arrows: &BTreeMap<PathBuf, BTreeSet<PathBuf>>) -> Vec<Vec<&PathBuf>> {
    let reached: BTreeMap<&PathBuf, BTreeSet<&PathBuf>> = arrows
        .keys()
        .map(|from| {
            let mut seen = BTreeSet::new();
            let mut ahead = vec![from];
            while let Some(file) = ahead.pop() {
                for next in arrows.get(file).into_iter().flatten() {
                    if seen.insert(next) {
                        ahead.push(next);
                    }
                }
            }
            (from, seen)
        })
        .collect();
    let mut found = Vec::new();
    let mut placed = BTreeSet::new();
    for (from, seen) in &reached {
        if !seen.contains(from) || placed.contains(from) {
            continue;
        }
        let circle: Vec<&PathBuf> = seen
            .iter()
            .filter(|file| reached.get(*file).is_some_and(|back| back.contains(from)))
            .copied()
            .collect();
        placed.extend(circle.iter().copied());
        found.push(circle);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn house(files: &[(&str, &str)]) -> Vec<String> {
        let root = tempfile::tempdir().unwrap();
        let source = root.path().join("embedshim-core/src");
        for (name, text) in files {
            let path = source.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let mut violations = Vec::new();
        check(root.path(), &mut violations).unwrap();
        violations
    }

    #[test]
    fn a_circle_through_a_facade_is_found_and_the_facade_is_none() {
        let facade = ("a/mod.rs", "mod b; mod c; pub use b::B; pub use c::C;");
        let good = [
            ("lib.rs", "mod a;"),
            facade,
            ("a/b.rs", "use super::C; pub struct B(C);"),
            ("a/c.rs", "pub struct C;"),
        ];
        assert_eq!(house(&good), Vec::<String>::new());
        let mut bad = good;
        bad[3] = ("a/c.rs", "pub struct C; fn f() { crate::a::B::g() }");
        let found = house(&bad);
        assert_eq!(found.len(), 1);
        assert!(
            found[0].contains("a/b.rs -> a/c.rs, a/c.rs -> a/b.rs"),
            "{found:?}"
        );
    }

    #[test]
    fn an_arrow_that_runs_up_is_found() {
        let files = [
            ("lib.rs", "mod task;"),
            ("task/mod.rs", "mod engine; mod process;"),
            ("task/engine.rs", "pub struct Engine;"),
            (
                "task/process.rs",
                "use crate::task::engine::Engine; struct P(Engine);",
            ),
        ];
        assert_eq!(house(&files).len(), 1);
    }
}

//! The modules of a crate, as parsed. Owns the way from `mod` to its file, and from a path in a
//! `use` to a module; decides nothing about what is public.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Context;
use syn::{Attribute, Item, ItemUse, UseTree};

/// A path of names from the crate's root.
pub(super) type Names = Vec<String>;

/// Every module of a crate, by its path.
#[derive(Default)]
pub(super) struct CrateSource {
    pub(super) modules: BTreeMap<Names, Vec<Item>>,
}

/// One name that a `use` brings in.
#[derive(Debug)]
pub(super) struct Import {
    /// As it is called here; `*` for a glob.
    pub(super) name: String,
    /// Where it is from, as written.
    pub(super) path: Names,
}

/// Reads a crate from its `lib.rs`.
pub(super) fn read(root: &Path) -> anyhow::Result<CrateSource> {
    let mut source = CrateSource::default();
    let directory = root.parent().unwrap_or(root);
    source.add_file(Names::new(), root, directory)?;
    Ok(source)
}

impl CrateSource {
    /// `below` is the directory where the files of this module's own modules are.
    fn add_file(&mut self, path: Names, file: &Path, below: &Path) -> anyhow::Result<()> {
        let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let parsed = syn::parse_file(&text).with_context(|| file.display().to_string())?;
        self.add(path, parsed.items, below)
    }

    /// Adds a module with its items.
    pub(super) fn add(
        &mut self,
        path: Names,
        items: Vec<Item>,
        below: &Path,
    ) -> anyhow::Result<()> {
        let items: Vec<_> = items.into_iter().filter(|item| !is_hidden(item)).collect();
        for item in &items {
            let Item::Mod(module) = item else { continue };
            let name = module.ident.to_string();
            let its = [path.clone(), vec![name.clone()]].concat();
            let directory = below.join(&name);
            if let Some((_, content)) = &module.content {
                self.add(its, content.clone(), &directory)?;
                continue;
            }
            let flat = below.join(format!("{name}.rs"));
            if flat.is_file() {
                self.add_file(its, &flat, &directory)?;
            } else {
                self.add_file(its, &directory.join("mod.rs"), &directory)?;
            }
        }
        self.modules.insert(path, items);
        Ok(())
    }

    /// The absolute path that `path` means in `module`; none if it leads out of the crate.
    pub(super) fn resolve(&self, module: &[String], path: &[String]) -> Option<Names> {
        let (first, rest) = path.split_first()?;
        let base = match first.as_str() {
            "crate" => Names::new(),
            "self" => module.to_vec(),
            "super" => module.split_last()?.1.to_vec(),
            name => {
                let is_own = self.declares(module, name);
                return is_own.then(|| [module, path].concat());
            }
        };
        match rest.first().map(String::as_str) {
            Some("super") => self.resolve(&base, rest),
            _ => Some([base, rest.to_vec()].concat()),
        }
    }

    /// Where the item that is called `name` in `module` is declared, through any number of imports.
    pub(super) fn origin(&self, module: &[String], name: &str) -> Option<Names> {
        // More steps than any chain of imports has, and an end to a circle.
        self.origin_within(module, name, 16)
    }

    fn origin_within(&self, module: &[String], name: &str, steps: usize) -> Option<Names> {
        if self.declares(module, name) {
            return Some([module, &[name.to_owned()]].concat());
        }
        let steps = steps.checked_sub(1)?;
        let uses = self
            .modules
            .get(module)?
            .iter()
            .filter_map(|item| match item {
                Item::Use(item) => Some(item),
                _ => None,
            });
        let import = uses.flat_map(imports).find(|import| import.name == name)?;
        let target = self.resolve(module, &import.path)?;
        let (last, parent) = target.split_last()?;
        self.origin_within(parent, last, steps)
    }

    fn declares(&self, module: &[String], name: &str) -> bool {
        let items = self.modules.get(module).map_or(&[][..], Vec::as_slice);
        items
            .iter()
            .any(|item| name_of(item).as_deref() == Some(name))
    }
}

/// The name that an item declares.
pub(super) fn name_of(item: &Item) -> Option<String> {
    let ident = match item {
        Item::Const(item) => &item.ident,
        Item::Enum(item) => &item.ident,
        Item::Fn(item) => &item.sig.ident,
        Item::Macro(item) => item.ident.as_ref()?,
        Item::Mod(item) => &item.ident,
        Item::Static(item) => &item.ident,
        Item::Struct(item) => &item.ident,
        Item::Trait(item) => &item.ident,
        Item::TraitAlias(item) => &item.ident,
        Item::Type(item) => &item.ident,
        Item::Union(item) => &item.ident,
        _ => return None,
    };
    Some(ident.to_string())
}

/// The names that a `use` brings in.
pub(super) fn imports(item: &ItemUse) -> Vec<Import> {
    let mut found = Vec::new();
    flatten(&item.tree, &[], &mut found);
    found
}

fn flatten(tree: &UseTree, before: &[String], found: &mut Vec<Import>) {
    let with = |name: &dyn ToString| [before, &[name.to_string()]].concat();
    match tree {
        UseTree::Path(path) => flatten(&path.tree, &with(&path.ident), found),
        UseTree::Name(name) if name.ident == "self" => found.push(Import {
            name: before.last().cloned().unwrap_or_default(),
            path: before.to_vec(),
        }),
        UseTree::Name(name) => found.push(Import {
            name: name.ident.to_string(),
            path: with(&name.ident),
        }),
        UseTree::Rename(rename) => found.push(Import {
            name: rename.rename.to_string(),
            path: with(&rename.ident),
        }),
        UseTree::Glob(_) => found.push(Import {
            name: "*".into(),
            path: before.to_vec(),
        }),
        UseTree::Group(group) => {
            for tree in &group.items {
                flatten(tree, before, found);
            }
        }
    }
}

/// Not in what a user compiles, or nothing that a user should know.
fn is_hidden(item: &Item) -> bool {
    let attributes: &[Attribute] = match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    };
    hides(attributes)
}

/// Whether one of these attributes takes its item out of the API.
pub(super) fn hides(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let Ok(list) = attribute.meta.require_list() else {
            return false;
        };
        let (name, argument) = (&list.path, list.tokens.to_string());
        let is_test = name.is_ident("cfg") && (argument == "test" || argument == "fuzzing");
        is_test || name.is_ident("doc") && argument == "hidden"
    })
}

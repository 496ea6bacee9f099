//! Which items a user of a crate can reach, module by module, and how they are printed. Follows
//! `pub use` within the crate; what is exported from another crate is named only.

use std::collections::BTreeMap;

use syn::{File, Ident, Item, ItemImpl, ItemMod, Type, parse_quote};

use super::crate_source::{CrateSource, Names, imports, name_of};
use super::strip;

/// The API as Rust without bodies.
pub(super) fn print(source: &CrateSource) -> String {
    let mut surface = Surface {
        source,
        shown: BTreeMap::new(),
    };
    let items = surface.module(&Names::new());
    prettyplease::unparse(&File {
        shebang: None,
        attrs: Vec::new(),
        items,
    })
}

struct Surface<'a> {
    source: &'a CrateSource,
    /// Items that are printed already, with the path under which they are.
    shown: BTreeMap<Names, Names>,
}

impl Surface<'_> {
    /// What is public in a module, its own and what it exports again, in the order of the names.
    fn module(&mut self, path: &[String]) -> Vec<Item> {
        let items = self.source.modules.get(path).cloned().unwrap_or_default();
        let mut found: BTreeMap<String, Vec<Item>> = BTreeMap::new();
        for item in items {
            match &item {
                Item::Use(exported) if strip::is_public(&exported.vis) => {
                    for import in imports(exported) {
                        let shown = self.exported(path, &import.path, &import.name);
                        found.entry(import.name).or_default().extend(shown);
                    }
                }
                _ if is_public(&item) => {
                    let name = name_of(&item).unwrap_or_default();
                    let shown = self.declared(path, &item, &name, path);
                    found.entry(name).or_default().extend(shown);
                }
                _ => {}
            }
        }
        found.into_values().flatten().collect()
    }

    /// An item of `module` that is public as `at::name`, with what is implemented for it.
    fn declared(&mut self, module: &[String], item: &Item, name: &str, at: &[String]) -> Vec<Item> {
        let origin = [module, &[name_of(item).unwrap_or_default()]].concat();
        let here = [at, &[name.to_owned()]].concat();
        if let Some(elsewhere) = self.shown.get(&origin).filter(|shown| **shown != here) {
            let path: syn::Path = path_of(elsewhere);
            return vec![parse_quote!(pub use crate::#path;)];
        }
        self.shown.insert(origin.clone(), here.clone());
        if let Item::Mod(declared) = item {
            let items = self.module(&origin);
            let (ident, its): (&Ident, _) = (&declared.ident, items);
            let shown: ItemMod = parse_quote!(pub mod #ident { #(#its)* });
            return vec![shown.into()];
        }
        let mut shown = vec![strip::item(item.clone())];
        shown.extend(self.implementations(&origin));
        shown
    }

    /// What `pub use path as name` in `module` makes public.
    fn exported(&mut self, module: &[String], path: &[String], name: &str) -> Vec<Item> {
        let target = self.source.resolve(module, path);
        let origin = target.as_ref().and_then(|target| {
            let (last, parent) = target.split_last()?;
            self.source.origin(parent, last)
        });
        let item = origin.as_ref().and_then(|origin| {
            let (last, parent) = origin.split_last()?;
            let items = self.source.modules.get(parent)?;
            let named = items
                .iter()
                .find(|item| name_of(item).as_ref() == Some(last));
            Some((parent.to_vec(), named?.clone()))
        });
        if let Some((parent, item)) = item {
            return self.declared(&parent, &item, name, module);
        }
        if name == "*" {
            let path: syn::Path = path_of(path);
            return vec![parse_quote!(pub use #path::*;)];
        }
        let (as_name, path): (Ident, syn::Path) = (ident(name), path_of(path));
        let is_renamed = path
            .segments
            .last()
            .is_none_or(|last| last.ident != as_name);
        vec![if is_renamed {
            parse_quote!(pub use #path as #as_name;)
        } else {
            parse_quote!(pub use #path;)
        }]
    }

    /// The public part of every `impl` for the type that is declared at `origin`: its own first,
    /// then traits.
    fn implementations(&self, origin: &Names) -> Vec<Item> {
        let mut found = Vec::new();
        for (module, items) in &self.source.modules {
            for item in items {
                let Item::Impl(item) = item else { continue };
                let is_its = self.subject(module, item).as_ref() == Some(origin);
                if is_its && !self.is_of_private_trait(module, item) {
                    found.extend(strip::implementation(item.clone()));
                }
            }
        }
        let key = |item: &ItemImpl| {
            let item = Item::Impl(item.clone());
            prettyplease::unparse(&parse_quote!(#item))
        };
        found.sort_by_cached_key(|item| (item.trait_.is_some(), key(item)));
        found.into_iter().map(Item::Impl).collect()
    }

    /// Where the type is declared that this `impl` is for.
    fn subject(&self, module: &[String], item: &ItemImpl) -> Option<Names> {
        let Type::Path(subject) = &*item.self_ty else {
            return None;
        };
        self.declaration(module, &subject.path)
    }

    fn declaration(&self, module: &[String], path: &syn::Path) -> Option<Names> {
        let segments = path.segments.iter();
        let names: Names = segments.map(|segment| segment.ident.to_string()).collect();
        if let [name] = &names[..] {
            return self.source.origin(module, name);
        }
        let (first, rest) = names.split_first()?;
        // `process::Process`, where `process` may be imported.
        let base = self.source.origin(module, first);
        let target = match base {
            Some(base) => [base, rest.to_vec()].concat(),
            None => self.source.resolve(module, &names)?,
        };
        let (last, parent) = target.split_last()?;
        self.source.origin(parent, last)
    }

    /// A trait of the crate's own that no `pub` declares: a user cannot name it.
    fn is_of_private_trait(&self, module: &[String], item: &ItemImpl) -> bool {
        let Some((_, path, _)) = &item.trait_ else {
            return false;
        };
        let declared = self.declaration(module, path);
        declared.is_some_and(|origin| {
            let Some((last, parent)) = origin.split_last() else {
                return false;
            };
            let items = self.source.modules.get(parent);
            let mut items = items.into_iter().flatten();
            let found = items.find(|item| name_of(item).as_ref() == Some(last));
            found.is_some_and(|item| !is_public(item))
        })
    }
}

fn is_public(item: &Item) -> bool {
    let visibility = match item {
        Item::Const(item) => &item.vis,
        Item::Enum(item) => &item.vis,
        Item::Fn(item) => &item.vis,
        Item::Mod(item) => &item.vis,
        Item::Static(item) => &item.vis,
        Item::Struct(item) => &item.vis,
        Item::Trait(item) => &item.vis,
        Item::Type(item) => &item.vis,
        Item::Union(item) => &item.vis,
        Item::Macro(item) => {
            let mut attributes = item.attrs.iter();
            return attributes.any(|attribute| attribute.path().is_ident("macro_export"));
        }
        _ => return false,
    };
    strip::is_public(visibility)
}

fn ident(name: &str) -> Ident {
    Ident::new(name, proc_macro2::Span::call_site())
}

fn path_of(names: &[String]) -> syn::Path {
    let segments = names.iter().map(|name| ident(name));
    parse_quote!(#(#segments)::*)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn api(text: &str) -> String {
        let mut source = CrateSource::default();
        let file = syn::parse_file(text).unwrap();
        source.add(Names::new(), file.items, Path::new("")).unwrap();
        print(&source)
    }

    #[test]
    fn what_is_private_is_not_listed_but_that_a_struct_has_private_fields_is() {
        let shown = api(
            "mod inner { pub struct Open { pub a: u8, b: u8 } struct Hidden;
             impl Open { pub fn new() -> Self { loop {} } fn own(&self) {} }
             impl Hidden { pub fn unreachable(&self) {} }
             impl Drop for Open { fn drop(&mut self) { own() } } }
             pub use inner::Open;",
        );
        assert_eq!(
            shown,
            "pub struct Open {\n    pub a: u8,\n    _private: _,\n}\nimpl Open {\n    pub fn new() -> Self {}\n}\nimpl Drop for Open {}\n"
        );
    }

    #[test]
    fn what_is_exported_twice_or_from_elsewhere_is_named() {
        let shown = api("pub mod a { pub fn f() {} } pub use a::f; pub use other::G as H;");
        assert_eq!(
            shown,
            "pub use other::G as H;\npub mod a {\n    pub fn f() {}\n}\npub use crate::a::f;\n"
        );
    }

    #[test]
    fn another_signature_is_another_api() {
        let one = api("pub trait T { fn f(&self) -> u8; }");
        assert_ne!(one, api("pub trait T { fn f(&self) -> u8 { 0 } }"));
        assert_ne!(one, api("pub trait T { fn f(&self) -> u16; }"));
        assert_eq!(one, api("/// Words.\npub trait T { fn f(&self) -> u8; }"));
    }
}

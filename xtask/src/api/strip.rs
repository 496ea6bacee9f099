//! Items without what is not API: bodies, comments, private fields and private functions. Never
//! decides whether an item is reachable.

use syn::punctuated::Punctuated;
use syn::{
    Attribute, Block, Expr, Field, Fields, ImplItem, Item, ItemImpl, TraitItem, Visibility,
    parse_quote,
};

use super::crate_source::hides;

/// Attributes that a user of the item notices.
const KEPT: [&str; 6] = [
    "async_trait",
    "cfg",
    "derive",
    "must_use",
    "non_exhaustive",
    "repr",
];

/// An item as a user sees it.
pub(super) fn item(mut item: Item) -> Item {
    match &mut item {
        Item::Const(item) => {
            attributes(&mut item.attrs);
            *item.expr = placeholder();
        }
        Item::Static(item) => {
            attributes(&mut item.attrs);
            *item.expr = placeholder();
        }
        Item::Enum(item) => {
            attributes(&mut item.attrs);
            for variant in &mut item.variants {
                attributes(&mut variant.attrs);
                for field in &mut variant.fields {
                    attributes(&mut field.attrs);
                }
            }
        }
        Item::Fn(item) => {
            attributes(&mut item.attrs);
            *item.block = empty();
        }
        Item::Struct(item) => {
            attributes(&mut item.attrs);
            fields(&mut item.fields);
        }
        Item::Trait(item) => {
            attributes(&mut item.attrs);
            item.items.retain_mut(trait_item);
        }
        Item::Type(item) => attributes(&mut item.attrs),
        _ => {}
    }
    item
}

/// What an `impl` adds for a user: the public part, or of a trait its types only. None if that is
/// nothing.
pub(super) fn implementation(mut item: ItemImpl) -> Option<ItemImpl> {
    attributes(&mut item.attrs);
    let is_of_trait = item.trait_.is_some();
    item.items.retain_mut(|item| match item {
        ImplItem::Fn(function) => {
            let is_public = is_public(&function.vis) && !hides(&function.attrs);
            attributes(&mut function.attrs);
            function.block = empty();
            is_public && !is_of_trait
        }
        ImplItem::Const(constant) => {
            let is_public = is_public(&constant.vis) && !hides(&constant.attrs);
            attributes(&mut constant.attrs);
            constant.expr = placeholder();
            is_public && !is_of_trait
        }
        ImplItem::Type(_) => true,
        _ => false,
    });
    (is_of_trait || !item.items.is_empty()).then_some(item)
}

pub(super) fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

fn trait_item(item: &mut TraitItem) -> bool {
    match item {
        TraitItem::Fn(function) => {
            let is_hidden = hides(&function.attrs);
            attributes(&mut function.attrs);
            // A body says that an implementation can leave it out.
            function.default = function.default.as_ref().map(|_| empty());
            !is_hidden
        }
        TraitItem::Const(constant) => {
            attributes(&mut constant.attrs);
            true
        }
        TraitItem::Type(item) => {
            attributes(&mut item.attrs);
            true
        }
        _ => true,
    }
}

fn attributes(attributes: &mut Vec<Attribute>) {
    attributes.retain(|attribute| {
        let name = attribute.path().segments.last();
        name.is_some_and(|name| KEPT.iter().any(|kept| name.ident == kept))
    });
}

/// A struct with a private field cannot be written out by a user, so that there is one is API.
fn fields(fields: &mut Fields) {
    match fields {
        Fields::Named(named) => {
            let count = named.named.len();
            let mut public: Punctuated<Field, _> = named
                .named
                .iter()
                .filter(|field| is_public(&field.vis) && !hides(&field.attrs))
                .cloned()
                .collect();
            for field in &mut public {
                attributes(&mut field.attrs);
            }
            if public.len() < count {
                let private: syn::FieldsNamed = parse_quote!({ _private: _ });
                public.extend(private.named);
            }
            named.named = public;
        }
        Fields::Unnamed(unnamed) => {
            for field in &mut unnamed.unnamed {
                attributes(&mut field.attrs);
                if !is_public(&field.vis) {
                    field.ty = parse_quote!(_);
                }
            }
        }
        Fields::Unit => {}
    }
}

fn empty() -> Block {
    parse_quote!({})
}

fn placeholder() -> Expr {
    parse_quote!(_)
}

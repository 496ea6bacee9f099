//! Two loaders for one object behind one interface: aya, which needs no C library, and libbpf
//! (feature `libbpf`), which is the reference. Owns which of them is called; whatever is loaded,
//! the maps are read by aya.

mod plan;
mod with_aya;
#[cfg(feature = "libbpf")]
mod with_libbpf;

pub use plan::Loader;
pub(crate) use plan::{Link, LoadError, Loaded, Plan};

/// Loads and attaches.
pub(crate) fn load(plan: &Plan<'_>) -> Result<Loaded, LoadError> {
    match plan.loader {
        Loader::Aya => with_aya::load(plan),
        #[cfg(feature = "libbpf")]
        Loader::Libbpf => with_libbpf::load(plan),
    }
}
